"""A rank ends with its torchrun, also before it has imported torch; no other asks for one."""

import os
import signal
import subprocess
import sys

import pytest

from tests.training import ROOT
from train.monitoring.launcher import ORPHANED, Launcher, _runs

RANK = """
import sys, time
from train.monitoring.interruption import Interruption
interruption = Interruption.before_imports()
assert "torch" not in sys.modules
print("begun", flush=True)
time.sleep(float(sys.argv[1]))
"""
# Starts a rank as torchrun would, and waits for it.
AGENT = """
import os, subprocess, sys
from launch.torchrun import _name_this_process
if sys.argv[2] == "named":
    _name_this_process()
os.environ["TORCHELASTIC_RUN_ID"] = "none"
subprocess.run([sys.executable, "-c", sys.argv[1], "60"])
"""
ELASTIC = {"TORCHELASTIC_RUN_ID": "1"}
NOBODY = 2**22 + 1  # more than any process number
NAMESPACE = os.readlink("/proc/self/ns/pid")


def python(*words, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", *words], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("named", ["named", "not installed"])
def test_a_rank_ends_while_it_imports_if_torchrun_is_killed(named):
    agent = python(AGENT, RANK, named)
    assert agent.stdout.readline() == "begun\n"
    agent.kill()
    assert agent.stdout.read() == ""  # to the end of the rank, which holds it open; else 60 s
    agent.wait()


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        (ELASTIC | {"SKIPSTONE_LAUNCHER": f"{NOBODY} {NAMESPACE}"}, ORPHANED),
        (ELASTIC | {"SKIPSTONE_LAUNCHER": f"{os.getpid()} {NAMESPACE}"}, 0),
        # In a container of its own, the number means another process.
        (ELASTIC | {"SKIPSTONE_LAUNCHER": f"{NOBODY} pid:[1]"}, 0),
        ({"SKIPSTONE_LAUNCHER": f"{NOBODY} {NAMESPACE}"}, 0),
        ({}, 0),
    ],
)  # fmt: skip
def test_a_rank_whose_torchrun_died_before_its_first_line_ends(environment, status):
    rank = python(RANK, "1.5", **environment)
    rank.communicate(timeout=30)
    assert rank.returncode == status


def test_without_torchrun_nothing_is_asked(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    launcher = Launcher()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not launcher.gone


def test_a_process_that_is_stopped_runs_and_a_zombie_does_not():
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGSTOP)
    assert _runs(process.pid)
    process.kill()
    while _runs(process.pid):
        pass
    process.wait()
