"""How a command ends: errors in one line, output whatever reads it. Imports none of ours."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def ending_as_a_command() -> Iterator[None]:
    """Run a command's body: a user's error becomes one line on stderr and exit code 2.

    Characters that the output cannot hold are replaced. Where its reader has gone, the command ends
    without a word.

    Raises:
        SystemExit: 2 after an error, 130 after Ctrl-C, 141 where the reader has gone, 143 after
            SIGTERM.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and _in_main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _write_no_more()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        _report(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def open_closed_streams() -> None:
    """Open /dev/null where a standard stream is closed, or the next file would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


@contextmanager
def naming_the_file(field: str, path: Path) -> Iterator[None]:
    """Name option and file where writing fails; the system's own error of a full disk does not.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        yield
    except BrokenPipeError:  # a pipe given as the file: its reader has gone
        raise
    except OSError as error:
        raise ValueError(f"{field}: {path}: {error.strerror or error}, give another path") from None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the cleaning up
    print("terminated", file=sys.stderr)
    raise SystemExit(128 + number)


def _report(error: Exception) -> None:
    try:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:  # a full disk, or the reader has gone
        _write_no_more()


def _write_no_more() -> None:
    """Send what cannot be written nowhere: Python tries again at exit, and complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
