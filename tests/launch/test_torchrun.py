"""torchrun is quiet about what a rank has reported, and about nothing else."""

import logging
import signal
import sys

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch import torchrun
from tests.training import ROOT


def ended(*statuses):
    """Return torchrun's exception after ranks have ended with these exit statuses."""
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file="none")
        for rank, status in enumerate(statuses)
    }
    return ChildFailedError("train/main.py", failures)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ended(2), 2),
        (ended(2, -signal.SIGTERM), 2),
        (ended(-signal.SIGTERM, 2), 2),
        (ended(1, 2, -signal.SIGKILL), 2),
        (SignalException("", signal.SIGINT), 130),
        (SignalException("", signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_end_that_is_on_the_screen_is_not_repeated(error, status, capsys):
    with pytest.raises(SystemExit) as stop:
        torchrun._report(type(error), error, None)
    assert stop.value.code == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error", [ended(1, -15), ended(1, 1), ended(-15), ended(-9), RuntimeError()]
)
def test_a_crash_is_shown_as_ever(error, capsys):
    torchrun._report(type(error), error, None)
    assert type(error).__name__ in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--nproc_per_node=2 train/main.py demo", True),
        (f"--nproc_per_node 2 {ROOT}/train/main.py", True),
        ("-m train.main demo", True),
        ("main.py", False),
        ("../train/main.py --name train/main", False),
        ("", False),
    ],
)
def test_only_our_training_ends_quietly(words, ours, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["torchrun", *words.split()])
    monkeypatch.setattr(sys, "excepthook", before := sys.excepthook)
    torchrun.rendezvous_handler()
    assert (sys.excepthook is not before) == ours


def test_what_torchrun_logs_of_a_quiet_end_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    monkeypatch.setattr(logger, "filters", [])
    torchrun.end_quietly()
    logger.warning("Sending process %s closing signal %s", 3, "SIGTERM")
    logger.error("failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s", 2, 0, 3, "python")
    logger.error("failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s", -9, 0, 3, "python")
    logger.warning("Unable to shutdown process 3 via 15, forcefully exiting via 9")
    assert [message.split()[0] for message in caplog.messages] == ["failed", "Unable"]
    assert "-9" in caplog.messages[0]
