"""Dataclasses as command lines: what is read, and every mistake in one line with its remedy."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from data.command_line import (
    _one_line,
    called_as,
    option_names,
    read_options,
    run_command,
)
from data.option_values import read_as


@dataclass(frozen=True, kw_only=True)
class Optim:
    """A section."""

    lr: float = 1e-3
    """Learning rate."""
    steps: int = 3
    """Steps."""


def pair_of(text):
    if text.count(",") != 1:
        raise ValueError(f"{text}, give two words")
    return tuple(text.split(","))


@dataclass(frozen=True, kw_only=True)
class Options:
    """A command."""

    run: Path
    """Where."""
    source: Annotated[Literal["hf", "ours"], tyro.conf.arg(name="from")] = "hf"
    """Format."""
    bits: Literal["int8", "int4"] | None = None
    """Bits."""
    fuse: tyro.conf.FlagConversionOff[bool] = False
    """A switch with a value."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """A switch without."""
    optim: Optim = field(default_factory=Optim)
    layers: int = 2
    """Layers."""
    top: int | None = None
    """Or none."""
    pair: Annotated[tuple[str, ...], read_as("A,B", pair_of, ",".join)] = ("a", "b")
    """Two words."""
    log: Path | None = None
    """Or none."""
    also: tuple[Path, ...] = ()
    """Any number."""

    def __post_init__(self):
        if self.layers > 99:
            raise ValueError(f"layers: {self.layers}, give fewer")


def read(text, **settings):
    return read_options(Options, text.split(), prog="x", description="d", **settings)


def test_options_are_the_fields():
    assert [*option_names(Options)] == [
        "run", "from", "bits", "fuse", "quick", "optim.lr", "optim.steps", "layers", "top",
        "pair", "log", "also",
    ]  # fmt: skip
    options = read("--run a --from ours --quick --optim.lr 2e-3 --fuse True --bits int4")
    assert options == Options(
        run=Path("a"), source="ours", quick=True, optim=Optim(lr=2e-3), fuse=True, bits="int4"
    )


def test_what_is_optional_may_be_none():
    assert read("--run a --top 3 --pair x,y") == Options(run=Path("a"), top=3, pair=("x", "y"))
    assert read("--run a --top None --bits None") == Options(run=Path("a"))


LONG = "/" + "very-long-folder-name" * 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "run: none, give --run PATH"),
        ("--run", "run: no value, give a value"),
        ("--run=", "run: empty, name a file or a folder"),
        ("--run a --log=", "log: empty, name a file or a folder"),
        ("--run a --also=", "also: empty, name each"),
        ("--run a --layers x", "layers: x, give an integer"),
        ("--run a --layers", "layers: no value, give an integer"),
        ("--run a --layers 2.5", "layers: 2.5, give an integer"),
        ("--run a --optim.lr much", "optim.lr: much, give a number"),
        ("--run a --optim.lr", "optim.lr: no value, give a number"),
        ("--run a --fuse maybe", "fuse: maybe, give one of False, True"),
        ("--run a --bits int7", "bits: int7, give one of int4, int8"),
        (f"--run a --layers {LONG}", f"layers: {LONG}, give an integer"),
        ("--run a --top x", "top: x, give an integer"),
        ("--run a --layers 100", "layers: 100, give fewer"),
        ("--run a --pair a", "pair: a, give two words"),
        ("--run a --quick True", "True: a value without an option, put its --option before it"),
        ("--run a b", "b: a value without an option, put its --option before it, see --help"),
        ("--run a --layer 3", "option: --layer does not exist, did you mean --layers?"),
        ("--run a --lr 1", "option: --lr does not exist, did you mean --optim.lr?"),
        ("--run a --learning-rate 1", "--learning-rate does not exist, did you mean --optim.lr?"),
        ("--run a --optm.lr 1", "option: --optm.lr does not exist, did you mean --optim.lr?"),
        ("--run a --zzzzzz 1", "option: --zzzzzz does not exist, give one of --run, --from"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(words, message):
    with pytest.raises(ValueError, match=".") as error:
        read(words, synonyms={"learning_rate": "optim.lr"})
    assert message in str(error.value)
    assert not str(error.value).startswith("Options")
    assert "\n" not in str(error.value)


def test_a_synonym_may_be_a_remedy():
    for words in ("--run a --gpus 2", "--run a --layers 3 gpus"):
        with pytest.raises(ValueError, match="(exist|option), run it under torchrun$"):
            read(words, synonyms={"gpus": "run it under torchrun"})


def test_the_error_is_found_in_a_box_of_plain_characters_too():
    box = """------ Value error ------
| Error parsing --steps:  |
| invalid 'abc'.          |
| ----------------------- |
| Argument helptext:      |
---------------------------"""
    assert _one_line(box, Options) == "steps: invalid 'abc'"
    missing = """ Required options
 --------------------
  Missing from x:
      --run PATH
          Where. (required)"""
    assert _one_line(missing, Options) == "run: none, give --run PATH"


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A command with words that have no option's name."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """Where to."""
    source: Annotated[Literal["hf", "ours"], tyro.conf.arg(name="from")]
    """Format."""
    parts: tuple[str, ...] = ()
    """Parts, which are listed
    one after the other."""


@pytest.mark.parametrize("words", ["--from hf a", "a --from hf", "--parts x y --from hf a"])
def test_positional_words_stand_before_or_after_options(words):
    parts = ("x", "y") if "--parts" in words else ()
    assert read_copy(words) == Copy(target=Path("a"), source="hf", parts=parts)
    assert [*option_names(Copy)] == ["from", "parts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from hf", "target: none, give TARGET"),
        ("a", "from: none, give --from {hf,ours}"),
        ("--from hf a b", "b: a value without an option, put its --option before it, see --help"),
        ("--from hf |", "target: empty, name a file or a folder"),
        ("--form hf a", "option: --form does not exist, did you mean --from?"),
    ],
)
def test_a_mistake_beside_positional_words_is_one_line(words, message):
    with pytest.raises(ValueError, match=".") as error:
        read_copy(words)
    assert str(error.value) == message


def test_lines_of_a_docstring_are_joined_in_the_help(capsys):
    with pytest.raises(SystemExit):
        read_copy("--help")
    assert "Parts, which are listed one after the other." in capsys.readouterr().out


def read_copy(words):
    given = ["" if word == "|" else word for word in words.split()]
    return read_options(Copy, given, prog="x", description="d")


@dataclass(frozen=True, kw_only=True)
class Described:
    """Do something.

    In a paragraph of
    2 lines.

    Example:
      python -m x
    """

    top: int | None = None
    """Or none."""


def test_the_docstring_is_the_description_and_what_is_optional_has_its_own_name(
    capsys,
):
    with pytest.raises(SystemExit):
        read_options(Described, ["--help"], prog="x")
    text = capsys.readouterr().out
    assert "Do something.\n\nIn a paragraph of 2 lines.\n\nExample:\n  python -m x\n" in text
    assert "--top INT " in text


def test_help_names_every_option_and_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit) as stop:
        read("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in text for name in option_names(Options))
    assert max(map(len, text.splitlines())) <= 70


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--run", "a"], 2, "error: layers: 2, too few, give 3\n"),
        (["--run", "a", "--layers", "5"], 130, "interrupted\n"),
        (["--run"], 2, "error: run: no value, give a value\n"),
    ],
)
def test_a_command_ends_with_its_code_and_one_line(monkeypatch, capsys, words, code, message):
    def command(options):
        if options.layers == 2:
            raise ValueError("layers: 2,\ntoo few,\n give 3")
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["x", *words])
    with pytest.raises(SystemExit) as stop:
        run_command(Options, command, prog="x", description="d")
    assert stop.value.code == code
    assert capsys.readouterr().err == message


CLOSED, FULL, READ = "closed", "full", "read"
ENDS = [
    (CLOSED, 141, b""),
    (FULL, 2, b"error: [Errno 28] No space left on device\n"),
    (READ, 0, b""),
]


@pytest.mark.parametrize(("reader", "code", "message"), ENDS)
def test_a_command_ends_quietly_whatever_reads_its_output(tmp_path, reader, code, message):
    (tmp_path / "x.py").write_text(
        "from data.command_line import run_command\n"
        "from tests.data.test_command_line import Described\n"
        "run_command(Described, lambda options: print('\\u2192' + 'x' * 200_000), prog='x')\n"
    )
    end, output = os.pipe()
    if reader == FULL:
        output = os.open("/dev/full", os.O_WRONLY)
    if reader != READ:
        os.close(end)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "x.py")],
        stdout=subprocess.PIPE if reader == READ else output,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONIOENCODING": "ascii",
        },
    )
    os.close(output)
    assert (done.returncode, done.stderr) == (code, message)
    if reader == READ:
        assert done.stdout == b"?" + b"x" * 200_000 + b"\n"


def test_the_usage_is_what_the_user_called(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "/bin/skipstone", "generate", "--help"])
    assert called_as("python -m inference.generate") == "skipstone generate"
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "inference.generate", "--help"])
    assert called_as("python -m inference.generate") == "python -m inference.generate"
