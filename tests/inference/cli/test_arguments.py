"""The options of all commands: read from documented lines, checked before anything is loaded."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.command_line import option_names, read_options
from inference.cli.arguments import RunOptions, picture_file
from inference.cli.terminal import write_json
from inference.evaluation.plot import write_exit_plot
from inference.loading.adapters import save_adapter

REQUIRED = {
    "benchmark": (),
    "calibrate": (),
    "evaluate": (),
    "fit_jump": (),
    "frequent_tokens": (),
    "generate": ("--prompt", "the"),
    "lm_harness": ("--tasks", "a"),
    "oracle": (),
    "skip_search": (),
    "train_gate": ("--form", "linear"),
    "tune": (),
}
COMMANDS = {
    name: (importlib.import_module(f"inference.{name}"), required)
    for name, required in REQUIRED.items()
}


def refused(monkeypatch, capsys, name, *arguments):
    """Return the error line of a command for options it refuses; its run does not exist."""
    module, required = COMMANDS[name]
    command = [name, "--run", "nowhere", *required, *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        module.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


def options_of(name):
    """Return the options of a command: the class that its file defines."""
    module, _ = COMMANDS[name]
    [kind] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, RunOptions)
        and value.__module__ == module.__name__
    ]
    return kind


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("benchmark --E 2,3 --d 4", {"E": (2, 3), "d": (4,), "compile": False}),
        ("benchmark --batch_size 1,4 --compile", {"batch_size": (1, 4), "compile": True}),
        ("benchmark --strategies a,b:E=2 --top_k 5", {"strategies": ("a", "b:E=2")}),
        ("benchmark --seed=7 --dtype None", {"seed": 7, "dtype": None}),
        ("evaluate --compare a.json b.json", {"compare": (Path("a.json"), Path("b.json"))}),
        ("evaluate --compare", {"compare": ()}),
        ("tune --thresholds 0.2,0.5 --quick", {"thresholds": (0.2, 0.5), "quick": True}),
        ("fit_jump --rank 8", {"rank": 8}),
        ("fit_jump --rank full", {"rank": None}),
        ("skip_search", {"prompts": 16, "max_new_tokens": 32, "prompt_tokens": 64}),
        ("lm_harness --tasks a,b", {"tasks": ("a", "b")}),
    ],
)
def test_documented_lines_are_read(line, expected):
    name, *words = line.split()
    options = read_options(options_of(name), ["--run", "x", *words], prog=name)
    assert {field: getattr(options, field) for field in expected} == expected


@pytest.mark.parametrize("name", REQUIRED)
def test_help_has_every_option_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        read_options(options_of(name), ["--help"], prog=name)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"Example:\n  python -m inference.{name} --run outputs/demo" in out
    assert all(f"--{option}" in out for option in option_names(options_of(name)))


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "--json") for name in COMMANDS]
    + [(name, "--output") for name in ("fit_jump", "train_gate")]
    + [(name, "--plot") for name in ("benchmark", "evaluate")],
)
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(
    name, option, monkeypatch, capsys, tmp_path
):
    folder, file = tmp_path / "folder.png", tmp_path / "file"
    folder.mkdir()
    file.write_text("")
    err = refused(monkeypatch, capsys, name, option, folder)
    assert f"{option[2:]}: {folder} is a folder, give a file" in err
    err = refused(monkeypatch, capsys, name, option, file / "x.png")
    assert f"{option[2:]}: {file}/x.png cannot be written" in err
    err = refused(monkeypatch, capsys, name, option, "/proc/nope/x.png")
    assert f"{option[2:]}: /proc/nope/x.png cannot be written" in err
    err = refused(monkeypatch, capsys, name, option, tmp_path / "a" / "b" / "x.png")
    assert not err.startswith(f"error: {option[2:]}: "), "what fails is what comes next"
    err = refused(monkeypatch, capsys, name, option, "")
    assert f"{option[2:]}: empty, name a file or a folder" in err
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "file"}


@pytest.mark.parametrize("name", ["benchmark", "evaluate"])
def test_a_picture_of_an_unknown_kind_is_refused(name, monkeypatch, capsys, tmp_path):
    for wrong in ("x.nope", "x"):
        err = refused(monkeypatch, capsys, name, "--plot", tmp_path / wrong)
        assert f"{wrong} is of no known kind, give a name in .jpg, .pdf, .png, .svg" in err


def test_a_file_that_cannot_be_written_is_named_with_its_option(biased_model, tmp_path):
    full = Path("/dev/full")
    with pytest.raises(ValueError, match="^json: /dev/full: No space left on device, give another"):
        write_json(full, {})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^plot: .*/file/x.png: File exists, give another"):
        write_exit_plot(tmp_path / "file" / "x.png", {"a": [1.0]})
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "it is a device, a pipe"), (Path("/proc/x"), ".*")):
        with pytest.raises(ValueError, match=f"^output: {path}: {reason}.*, give another path$"):
            save_adapter(path, "gate", biased_model, {}, {})


@pytest.mark.parametrize("kind", ["jpg", "pdf", "png", "svg", "PNG"])
def test_pictures_of_the_known_kinds_can_be_drawn(kind, tmp_path):
    path = picture_file(str(tmp_path / f"x.{kind}"))
    write_exit_plot(path, {"run": [2.0, 1.0]})
    assert path.stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("generate", "--seed", 2**64, f"{2**64}, give 0 to {2**64 - 1}"),
        ("benchmark", "--seed", -1, "-1, give 0 to"),
        ("skip_search", "--seed", "9" * 5000, "give 0 to"),
        ("train_gate", "--seed", "a", "a, give 0 to"),
        ("tune", "--thresholds", "0.5,a", "0.5,a, give numbers, as in 0.5,0.9"),
        ("fit_jump", "--rank", "abc", "abc, give a whole number or full"),
        ("benchmark", "--batch_size", "1,x", "1,x, give whole numbers, at least 1, as in 1,4"),
        ("oracle", "--lanes", 0, "0, give at least 1"),
        ("train_gate", "--epochs", 1.5, "1.5, give an integer"),
        ("skip_search", "--top_k", "x", "x, give an integer"),
        ("evaluate", "--dtype", "int3", "int3, give one of bfloat16, float16, float32"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_with_what_is_wanted(
    name, option, value, message, monkeypatch, capsys
):
    err = refused(monkeypatch, capsys, name, option, value)
    assert err.startswith(f"error: {option[2:]}: ")
    assert message in err


def test_the_largest_seed_is_taken(run_folder, monkeypatch, capsys):
    arguments = ["--run", run_folder, "--prompt", "the", "--max_new_tokens", 2]
    arguments += ["--seed", 2**64 - 1, "--temperature", 1]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    COMMANDS["generate"][0].main()
    assert "2 tokens" in capsys.readouterr().err


def test_a_compiler_that_fails_is_one_line(run_folder, tmp_path):
    arguments = ["--run", run_folder, "--prompt", "the", "--max_new_tokens", 3, "--compile"]
    done = subprocess.run(
        [sys.executable, "-m", "inference.generate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: compile: torch's compiler failed (")
    assert "leave --compile out" in last
