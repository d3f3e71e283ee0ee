"""The first signal to stop sets the flag, once, and has no other effect."""

import os
import signal
import time

import pytest

from train.monitoring.interruption import SIGNALS, Interruption


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


def test_an_orphan_is_asked_to_stop():
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
    assert text == b"rthe end of the launcher"
