"""What all commands share: paths and numbers are checked before anything is loaded."""

import importlib
import os
import subprocess
import sys

import pytest

from inference.cli.arguments import picture_file
from inference.evaluation.plot import write_exit_plot

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
    """Return the one line a command says to arguments it refuses; its run is not there."""
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
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "file"}


@pytest.mark.parametrize("name", ["benchmark", "evaluate"])
def test_a_picture_of_an_unknown_kind_is_refused(name, monkeypatch, capsys, tmp_path):
    for wrong in ("x.nope", "x"):
        err = refused(monkeypatch, capsys, name, "--plot", tmp_path / wrong)
        assert f"{wrong} is of no known kind, give a name in .jpg, .pdf, .png, .svg" in err


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
    ],
)
def test_a_value_that_cannot_be_read_is_told_what_is_wanted(
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
