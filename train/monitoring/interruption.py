"""Requests to stop: a flag that the ranks agree on between two steps.

Knows nothing of steps or checkpoints. A scheduler's SIGTERM or SIGUSR1 may reach one rank, all of
them, several times, or kill torchrun alone; in each case this rank's flag is set once.
"""

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption:
    """Whether this process is to stop, and why; signals are caught within `with`."""

    def __init__(self) -> None:
        self._pid, self._parent = os.getpid(), os.getppid()
        self._signal = ""
        self._before: dict[signal.Signals, signal._HANDLER] = {}

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
        if not self._signal and os.getppid() != self._parent:
            return "the end of the launcher"
        return self._signal

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Set the flag to the first signal; a second Ctrl-C stops at once."""
        if os.getpid() != self._pid:  # a worker process that inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number).name
