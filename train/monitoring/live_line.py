"""The line of a run on a terminal, with its bar, redrawn at every step; in a log there is none.

Log lines go above it. Nothing it meets, such as a terminal that is gone, ends a run.
"""

import io
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from train.parallel.runtime import Runtime

_FORMAT = "step {n_fmt}/{total_fmt}{desc} | ETA {remaining} | {percentage:.0f}% |{bar:24}|"
"""A narrow terminal cuts its end."""


class LiveLine:
    """A context; where rank 0 writes to no terminal, it does nothing."""

    def __init__(self, steps: int, runtime: Runtime) -> None:
        """Draw nothing before the first step of a run of `steps`."""
        self._steps, self._stream = steps, sys.stderr
        self._shows = runtime.is_main and self._stream.isatty()
        self._bar: tqdm[None] | None = None
        self._handlers: list[logging.StreamHandler[TextIO]] = []

    def __enter__(self) -> "LiveLine":
        if self._shows:
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                    handler.setStream(_AboveTheLine(self._stream))
                    self._handlers.append(handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the line."""
        for handler in self._handlers:
            handler.setStream(self._stream)
        if self._bar is not None and self._shows:
            self._try(self._bar.close)

    def show(self, done: int, *, loss: float | None, tokens: int) -> None:
        """Show the steps done so far, fewer than before after a rollback.

        Args:
            done: Steps done.
            loss: Of the last layer; None: it had none.
            tokens: Of the last step.
        """
        if self._shows:
            self._try(lambda: self._draw(done, loss, tokens))

    def _draw(self, done: int, loss: float | None, tokens: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                initial=done, total=self._steps, bar_format=_FORMAT, file=self._stream,
                leave=False, dynamic_ncols=True, miniters=1,
            )  # fmt: skip
        bar, parts = self._bar, []
        if loss is not None:
            parts.append(f" | loss {loss:.3f}")
        if rate := bar.format_dict["rate"]:
            parts.append(f" | {rate * tokens:,.0f} tok/s")
        bar.set_description_str("".join(parts), refresh=False)
        bar.update(done - bar.n)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):  # it is gone, or closed
            self._shows = False


class _AboveTheLine(io.TextIOBase):
    """The stream, for lines that are to stay: the live line makes room for them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with tqdm.external_write_mode(file=self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()
