"""A finding, and the process that a check has to itself, ended where it takes too long."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection
from types import FrameType

ENDED_WITHIN_SECONDS = 1.0
"""How long a check that is stopped has to remove its files."""


class Level(StrEnum):
    """What a finding means for training."""

    OK = "ok"
    OPTIONAL = "optional"  # only a feature is missing
    WARNING = "warning"
    PROBLEM = "problem"  # training is not possible


@dataclass(frozen=True)
class Finding:
    """What a check has found, and what to do about it."""

    check: str
    level: Level
    found: str
    remedy: str = ""
    details: dict[str, object] = field(default_factory=dict)
    """More for the JSON."""

    def __str__(self) -> str:
        arrow = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.level:8}  {self.check:9}  {self.found}{arrow}"


class Check:
    """A check under way in a process of its own, so that none can take the others down or hang.

    Args:
        name: Heads its findings.
        function: Yields findings. It runs in a fork of this process, which has not imported torch.
        arguments: Of the function.
        seconds: When to end it.
        remedy: What to do where it does not end, or dies.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Iterator[Finding]],
        *arguments: object,
        seconds: float,
        remedy: str = "",
    ) -> None:
        self.name, self.seconds, self.remedy = name, seconds, remedy
        self._until = time.monotonic() + seconds
        fork = multiprocessing.get_context("fork")
        self._receiver, sender = fork.Pipe(duplex=False)
        self._process = fork.Process(
            target=_run, args=(sender, name, function, arguments, seconds), daemon=True
        )
        self._process.start()
        sender.close()

    def findings(self) -> Iterator[Finding]:
        """Yield what it finds, as it comes, and what became of it where it did not end."""
        while True:
            try:
                if not self._receiver.poll(max(self._until - time.monotonic(), 0)):
                    self.stop()
                    yield self._problem(f"no answer within {self.seconds:g} s")
                    return
                finding = self._receiver.recv()
            except (EOFError, OSError):
                yield self._problem(f"its process died{self._signal()}")
                return
            if finding is None:
                return
            yield finding

    def stop(self) -> None:
        """End it; one that waits for a dead disk cannot be, and is left behind."""
        self._process.terminate()
        self._process.join(ENDED_WITHIN_SECONDS)
        self._process.kill()

    def _problem(self, found: str) -> Finding:
        return Finding(self.name, Level.PROBLEM, found, self.remedy)

    def _signal(self) -> str:
        self._process.join(ENDED_WITHIN_SECONDS)
        code = self._process.exitcode
        return f" of {signal.Signals(-code).name}" if code is not None and code < 0 else ""


def _run(
    sender: Connection,
    name: str,
    function: Callable[..., Iterator[Finding]],
    arguments: tuple[object, ...],
    seconds: float,
) -> None:
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(seconds) + 30)  # where the parent, which would end it, was killed
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # libraries write there as they like
        os.dup2(nowhere, stream)
    try:
        for finding in function(*arguments):
            sender.send(finding)
    except ModuleNotFoundError as error:
        remedy = f"pip install {error.name}"
        sender.send(Finding(name, Level.PROBLEM, f"{error.name} is not installed", remedy))
    except Exception as error:  # the entry of a process
        found = f"{type(error).__name__}: {one_line(error)}"
        sender.send(Finding(name, Level.WARNING, f"the check failed, {found}"))
    with suppress(OSError):
        sender.send(None)
    os._exit(0)  # at exit, threads of a process group may abort


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def one_line(error: BaseException, longest: int = 200) -> str:
    """Return the text of an error in one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
