"""Writes that a run can do without: metrics, charts, events, status.

None of them may end a run. A write that fails costs what it would have written and one warning; the
next is tried all the same. Checkpoints are not written here.
"""

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_failing: set[str] = set()


def attempt(target: Path | str, action: Callable[[], object]) -> bool:
    """Run a write to `target`; return whether it succeeded.

    The first failure in a row is a warning with the target's name, and so is its end.
    """
    name = str(target)
    try:
        action()
    except Exception as error:  # whatever a disk, a network or a library of charts may raise
        if name not in _failing:
            _failing.add(name)
            text = "%s: not written, %s; training goes on, and later writes are tried"
            logger.warning(text, name, reason_of(error))
        return False
    if name in _failing:
        _failing.discard(name)
        logger.warning("%s: written again", name)
    return True


def reason_of(error: Exception) -> str:
    """Return the message of an error, as one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def append(path: Path, data: bytes, *, head: bytes = b"", sync: bool = False) -> None:
    """Append to a file, all or nothing; for any thread of any rank.

    Args:
        path: The file, which is made if it is missing; its folder must exist.
        data: What to append.
        head: What goes before it into an empty file.
        sync: Also sync the file to the disk.

    Raises:
        OSError: If it was not written.
    """
    # Nor waiting: a pipe that nobody reads is an error.
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NONBLOCK, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        whole = data if size else head + data
        try:
            if os.write(descriptor, whole) < len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):  # of a device
                os.ftruncate(descriptor, size)
            raise
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file aside, sync it and rename it into place, in a folder that is made if missing.

    Raises:
        OSError: If it was not written; the old file is then still there.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several ranks may write it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


class GrowingFile:
    """A file that grows by whole pieces, and is begun again where someone has removed it."""

    def __init__(self, path: Path, head: bytes = b"") -> None:
        """Write nothing yet; `head` is what a new file begins with."""
        self.path, self._head, self._begun = path, head, False

    def append(self, data: bytes) -> None:
        """Append a piece.

        Raises:
            OSError: If it was not written.
        """
        removed = self._begun and not self.path.exists()
        append(self.path, data, head=self._head)
        self._begun = True
        if removed:
            logger.warning("%s: was removed, begun again", self.path)
