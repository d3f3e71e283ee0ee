"""Checkpoints on a file system: written into a folder aside, hashed, then renamed.

Suffixes of folders that are not resumed from: `.tmp` (being written), `.old` (being replaced),
and those of checkpoints set aside.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from models.checkpoint_format import FileEntry, Manifest, checkpoint_steps, file_entry
from train.checkpoints.folder import ABANDONED, DAMAGED, amount, first_failure, superseded

_CAUSES = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file larger than this process may write (ulimit -f)",
}
logger = logging.getLogger(__name__)


class LocalFolder:
    """A `CheckpointFolder` on a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, name: str) -> None:
        """Make the empty folder aside."""
        aside = self._aside(name)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def writer(self, name: str) -> FileSystemWriter:
        """Return DCP's writer into the folder aside."""
        return FileSystemWriter(self._aside(name), sync_files=True)

    def written(self, name: str, rank: int) -> dict[str, FileEntry]:
        """Read and hash the files of this rank."""
        found = self._aside(name).glob(f"__{rank}_*.distcp")
        return {path.name: file_entry(path) for path in found}

    def commit(
        self, name: str, manifest: Manifest, texts: Mapping[str, bytes], files: dict[str, FileEntry]
    ) -> None:
        """Write the rest, the manifest last, and rename the folder."""
        aside = self._aside(name)
        for text, content in texts.items():
            write_synced(aside / text, content)
        rest = {name: file_entry(aside / name) for name in (".metadata", *texts)}
        replace(manifest, files=files | rest).write(aside)
        publish(aside, self.path / name)

    def discard(self, name: str) -> None:
        """Remove the folder aside."""
        shutil.rmtree(self._aside(name), ignore_errors=True)

    def clean_up(self) -> None:
        """Delete what is half written, and restore what is half replaced."""
        with _allowed_in(self.path):
            for path in self.path.glob("step-*.tmp"):
                shutil.rmtree(path)
            for path in self.path.glob("step-*.old"):
                if path.with_suffix("").exists():
                    shutil.rmtree(path)
                else:
                    path.rename(path.with_suffix(""))

    def set_aside(self, name: str, suffix: str) -> None:
        """Rename the checkpoint."""
        target = self.path / (name + suffix)
        with _allowed_in(self.path):
            shutil.rmtree(target, ignore_errors=True)
            (self.path / name).rename(target)

    def prune(self, keep_latest: int, keep_every_steps: int) -> None:
        """Delete old checkpoints; one that cannot be deleted is a warning."""
        if not keep_latest:
            return
        steps = checkpoint_steps(self.path)
        old = [
            self.path / steps[step].name
            for step in superseded([*steps], keep_latest, keep_every_steps)
        ]
        for suffix in (DAMAGED, ABANDONED):
            old += sorted(self.path.glob(f"step-*{suffix}"))[:-1]
        for path in old:
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("checkpoint: could not delete %s: %s", path, error)

    def refusal(self, problem: str) -> str:
        """Ask for room."""
        return f"checkpoint: {problem}, make room there and start the run again"

    def explain(self, error: BaseException, needed_bytes: int) -> str:
        """Describe the error; of a full disk, with needed and free bytes."""
        cause, folder = first_failure(error), self.path
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

    def _aside(self, name: str) -> Path:
        return self.path / f"{name}.tmp"


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
