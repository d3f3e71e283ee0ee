"""The folder of a run's checkpoints: name, keep and delete them, from one process.

`step-00000500` is a finished checkpoint. Those with a suffix are never resumed from: `.tmp` (being
written), `.old` (being replaced), `.damaged` (does not verify), `.abandoned` (rolled back from).
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from models.checkpoint_format import checkpoint_steps

DAMAGED, ABANDONED = ".damaged", ".abandoned"
_CAUSES = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file larger than this process may write (ulimit -f)",
}
logger = logging.getLogger(__name__)


def begin_folder(aside: Path) -> None:
    """Make the empty folder that a checkpoint is written into."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file, and sync it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def publish(aside: Path, path: Path) -> None:
    """Rename a complete checkpoint to its name; an older one of that name stays until then."""
    _sync_folder(aside)
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    aside.rename(path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Delete checkpoints that a kill left half written, and restore those it left half replaced.

    Raises:
        ValueError: If the folder is not writable.
    """
    with _allowed_in(folder):
        for path in folder.glob("step-*.tmp"):
            shutil.rmtree(path)
        for path in folder.glob("step-*.old"):
            if path.with_suffix("").exists():
                shutil.rmtree(path)
            else:
                path.rename(path.with_suffix(""))


def set_aside(path: Path, suffix: str) -> None:
    """Rename a checkpoint so that it is not resumed from.

    Raises:
        ValueError: If the folder is not writable.
    """
    target = path.with_name(path.name + suffix)
    with _allowed_in(path.parent):
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)


def prune(folder: Path, keep_latest: int, keep_every_steps: int) -> None:
    """Delete all checkpoints but the newest `keep_latest` and every `keep_every_steps`-th step.

    Of those set aside, the newest of each kind is kept. `keep_latest` 0 deletes nothing.
    """
    if not keep_latest:
        return
    steps = checkpoint_steps(folder)
    old = [
        path
        for step, path in list(steps.items())[:-keep_latest]
        if not keep_every_steps or step % keep_every_steps
    ]
    for suffix in (DAMAGED, ABANDONED):
        old += sorted(folder.glob(f"step-*{suffix}"))[:-1]
    for path in old:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("checkpoint: could not delete %s: %s", path, error)


def explain(error: BaseException, folder: Path, needed_bytes: int) -> str:
    """Describe why a checkpoint could not be written; of a full disk, with needed and free bytes.

    Args:
        error: An OSError, or what DCP raises on every rank for any error on one.
        folder: The folder it was written into.
        needed_bytes: Size of its tensors.
    """
    cause = first_failure(error)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    # torch's writer reports the file position of a short write, not the error of the system.
    cut_short = "inline_container" in str(cause)
    if isinstance(cause, OSError) and cause.errno in _CAUSES:
        reason = _CAUSES[cause.errno]
    elif free < needed_bytes:
        reason = _CAUSES[errno.ENOSPC]
    elif cut_short:
        reason = "a write was cut short, as by a disk quota or a file size limit (ulimit -f)"
    else:
        return str(cause)
    return f"{reason}: needs {amount(needed_bytes)}, {amount(free)} free at {folder}"


def first_failure(error: BaseException) -> BaseException:
    """Return the error of the first rank with one, or `error` itself if DCP did not raise it."""
    if isinstance(error, CheckpointException):
        return error.failures[min(error.failures)][0]
    return error


def amount(num_bytes: int) -> str:
    """Return a number of bytes in GiB, MiB or KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes} B"


@contextmanager
def _allowed_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"checkpoint: {folder}: {error}, make it writable") from error


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, where the file system supports it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)
