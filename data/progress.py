"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import logging
import sys
import time
from contextlib import suppress
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """A context that counts the bytes processed.

    Args:
        label: name of the work.
        total_bytes: of all the work, if known.
        is_main: whether this process draws the bar; one of several does.
    """

    def __init__(self, label: str, total_bytes: int | None = None, *, is_main: bool = True) -> None:
        self._label = label
        self._total = "" if total_bytes is None else f" of {total_bytes / 1e6:.1f}"
        self._done_bytes = 0
        self._next_line = time.monotonic() + _LINE_INTERVAL_SECONDS
        self._bar = tqdm(
            total=total_bytes,
            desc=label,
            unit="B",
            unit_scale=True,
            disable=not (is_main and sys.stderr.isatty()),
            leave=False,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the bar and, without an error, log the total."""
        with suppress(OSError):
            self._bar.close()
        if error is None:
            logger.info("%s: %.1f MB, done", self._label, self._done_bytes / 1e6)

    def update(self, count_bytes: int) -> None:
        """Add bytes processed since the last call."""
        self._done_bytes += count_bytes
        with suppress(OSError):  # a terminal that is gone
            self._bar.update(count_bytes)
        if self._bar.disable and time.monotonic() >= self._next_line:
            logger.info("%s: %.1f%s MB", self._label, self._done_bytes / 1e6, self._total)
            self._next_line = time.monotonic() + _LINE_INTERVAL_SECONDS
