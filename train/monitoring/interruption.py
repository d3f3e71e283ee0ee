"""Requests to stop: a flag that the ranks agree on between two steps. Imported before torch is.

Knows nothing of steps or checkpoints. A scheduler's SIGTERM or SIGUSR1 may reach one rank, all of
them, several times, or kill torchrun alone; in each case this rank's flag is set once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from train.monitoring.launcher import Launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequestError(BaseException):
    """A stop was requested where there is no step to wait for; no `except Exception` meets it."""


class Interruption:
    """Whether this process is to stop, and why; signals are caught within `with`."""

    def __init__(self) -> None:
        self._pid, self._launcher = os.getpid(), Launcher()
        self._signal = ""
        self._raises = False
        self._trains = threading.Event()
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    @classmethod
    def before_imports(cls) -> "Interruption":
        """Catch signals from now on, as a rank spends its first seconds on imports.

        It alone may have been signalled, so it stops with the others, once they have met. Ctrl-C,
        and the end of the launcher, end it at once: nothing is there yet to be saved.
        """
        interruption = cls()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, interruption._notice)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        interruption._launcher.end_with_it(interruption._trains)
        return interruption

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str:
        """Why to stop: the name of a signal, or the end of the launcher; empty: go on."""
        if not self._signal and self._launcher.gone:
            return "the end of the launcher"
        return self._signal

    def start_training(self) -> None:
        """Let the end of the launcher stop this rank like a signal: there is something to save."""
        self._trains.set()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a request end the `with` block, in place of the step that there is not.

        Raises:
            StopRequestError: A stop is requested, or was before.
        """
        if self.reason:
            raise StopRequestError(self.reason)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Set the flag to the first signal; a second Ctrl-C stops at once."""
        if os.getpid() != self._pid:  # a worker process that inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number).name
        if self._raises:
            self._raises = False  # what is cleaned up now is not to be disturbed again
            raise StopRequestError(self._signal)
