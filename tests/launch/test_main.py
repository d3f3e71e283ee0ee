"""`skipstone VERB` runs the module of the verb, and training under torchrun."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed import run

from launch import __version__, main
from launch.torchrun import SCRIPT


def skipstone(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["skipstone", *words])
    return main.main()


def test_help_lists_every_verb_and_each_is_a_command(monkeypatch, capsys):
    assert skipstone(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for verb, (module, summary) in main.VERBS.items():
        assert f"  {verb} " in text
        assert summary in text
        assert 'if __name__ == "__main__":' in Path(find_spec(module).origin).read_text()
    assert skipstone(monkeypatch) == 2


def test_help_into_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch.main", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_version(monkeypatch, capsys):
    assert skipstone(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"skipstone {__version__}\n"


@pytest.mark.parametrize(
    ("verb", "hint"), [("genrate", "did you mean generate?"), ("zzz", "give one of prepare, train")]
)
def test_an_unknown_verb_is_one_line(verb, hint, monkeypatch, capsys):
    assert skipstone(monkeypatch, verb) == 2
    assert capsys.readouterr().err.startswith(f"error: verb: {verb} does not exist, {hint}")


def test_a_verb_is_its_module(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "train.sweep", raising=False)
    with pytest.raises(SystemExit) as stop:
        skipstone(monkeypatch, "sweep", "--help")
    assert stop.value.code == 0
    assert "python -m train.sweep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "launcher", "training"),
    [
        ("", "--nproc_per_node=3 --standalone", ""),
        ("demo --steps 3", "--nproc_per_node=3 --standalone", "demo --steps 3"),
        ("--steps 3", "--nproc_per_node=3 --standalone", "--steps 3"),
        ("--nproc-per-node 8 --steps 3", "--nproc-per-node 8 --standalone", "--steps 3"),
        (
            "--nnodes=2 --nproc_per_node=8 --rdzv-endpoint a_b:1 --max-restarts 3 demo --seed 1",
            "--nnodes=2 --nproc_per_node=8 --rdzv-endpoint a_b:1 --max-restarts 3",
            "demo --seed 1",
        ),
        ("--no-python demo", "--no-python --nproc_per_node=3 --standalone", "demo"),
    ],
)
def test_options_of_torchrun_come_first(words, launcher, training, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "main", seen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(main, "prepare", lambda: None)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    assert skipstone(monkeypatch, "train", *words.split()) == 0
    assert seen == [[*launcher.split(), str(SCRIPT), *training.split()]]
