"""The live line is for terminals alone, makes room for log lines, and cannot end a run."""

import logging
import os
import re
import sys
import termios
import threading

import pytest

from train import main as command
from train.main import main


class Terminal:
    """A terminal, and all that was written to it."""

    def __init__(self, columns=100):
        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (30, columns))
        self.stream = os.fdopen(slave, "w", buffering=1)
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while part := self._read_some():
            self._parts.append(part)

    def _read_some(self):
        try:
            return os.read(self.master, 65536)
        except OSError:  # the other end is closed
            return b""

    def close(self):
        """Return what was written, closing the terminal."""
        self.stream.close()
        self._reader.join(10)
        os.close(self.master)
        return b"".join(self._parts).decode()


@pytest.fixture
def console(monkeypatch):
    """Return start(stream): log to the stream as the command does, which is stderr then."""
    monkeypatch.setattr(command, "start_logging", lambda: None)
    root, handlers = logging.getLogger(), []

    def start(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        handlers.append(logging.StreamHandler(stream))
        root.addHandler(handlers[0])
        root.setLevel(logging.INFO)

    level = root.level
    yield start
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)


def screen_lines(written):
    """Return the lines that stay on a terminal: what a carriage return goes back over is gone."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        cells = []
        for part in line.split("\r"):
            part = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", part)
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_a_terminal_shows_a_live_line_below_the_log_lines(training, console):
    terminal = Terminal()
    console(terminal.stream)
    assert main(training.arguments(name="live", steps=4, speculation__interval_steps=2)) == 0
    written = terminal.close()
    line = r"\rstep (\d)/4(?: \| loss [\d.]+)?(?: \| [\d,]+ tok/s)? \| ETA [\d:?]+ \| \d+% \|"
    drawn = re.findall(line, written)
    assert drawn, written
    assert set(drawn) <= set("1234")
    assert "loss" in written
    kept = [line for line in screen_lines(written) if line]
    # Log lines are whole and alone; nothing of the live line is left.
    for begin in ("step 2/4 | J ", "step 4/4 | J ", "drafts at step 4: agreement E=1 ", "next: "):
        assert sum(line.startswith(begin) for line in kept) == 1, (begin, kept)
    assert not [line for line in kept if re.match(r"step \d/4 \|[^J]*%", line)], kept


def test_a_narrow_terminal_shows_the_loss(training, console):
    terminal = Terminal(columns=24)
    console(terminal.stream)
    assert main(training.arguments(name="narrow", steps=3)) == 0
    written = terminal.close()
    assert re.search(r"\rstep \d/3 \| loss \d+\.\d", written)
