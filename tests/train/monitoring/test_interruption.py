"""The first signal to stop sets the flag, once, and has no other effect."""

import os
import signal
import time

import pytest

from train.monitoring.interruption import SIGNALS, Interruption, StopRequestError


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number):
    with Interruption() as interruption:
        assert interruption.reason == ""
        os.kill(os.getpid(), number)
        assert interruption.reason == number.name


def test_the_first_of_several_signals_is_the_reason():
    with Interruption() as interruption:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert interruption.reason == "SIGUSR1"


def test_a_second_ctrl_c_stops_at_once():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_afterwards_the_signals_are_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def as_they_were():
    """Set the signals back to how they were, after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_during_set_up_ends_it_once(as_they_were):
    def prepare():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # does not disturb what is cleaned up

    with Interruption.before_imports() as interruption:
        with interruption.at_once():
            pass
        with pytest.raises(StopRequestError, match="SIGUSR1"), interruption.at_once():
            prepare()
        assert interruption.reason == "SIGUSR1"


def test_a_signal_during_the_imports_is_kept(as_they_were):
    interruption = Interruption.before_imports()
    os.kill(os.getpid(), signal.SIGTERM)
    with interruption, pytest.raises(StopRequestError, match="SIGTERM"), interruption.at_once():
        raise AssertionError("begun though a stop was requested")


def forked(body):
    """Run `body` in a child process and return its exit status."""
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_worker_process_that_inherits_the_handlers_still_dies_of_a_signal():
    with Interruption():
        assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("variable", "reason"), [("TORCHELASTIC_RUN_ID", b"the end of the launcher"), ("SLURM_ID", b"")]
)
def test_an_orphan_of_torchrun_alone_is_asked_to_stop(variable, reason, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv(variable, "none")
    # The grandchild writes into a pipe, its parent being gone.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        parent = os.getpid()
        if os.fork() == 0:
            interruption = Interruption()
            os.write(writer, b"r")
            while os.getppid() == parent:
                time.sleep(0.01)
            os.write(writer, interruption.reason.encode())
            os._exit(0)
        time.sleep(0.5)
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    text = b""
    while part := os.read(reader, 100):
        text += part
    assert text == b"r" + reason
