"""What a folder of checkpoints does, on a file system and in an object store alike.

`step-00000500` is a finished checkpoint. Those set aside are never resumed from: `damaged` ones do
not verify, `abandoned` ones were rolled back from. All is done from one process but for `writer`
and `written`, which every rank calls.
"""

from collections.abc import Mapping
from typing import Protocol

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from data.urls import Location
from models.checkpoint_format import FileEntry, Manifest

DAMAGED, ABANDONED = ".damaged", ".abandoned"


class CheckpointFolder(Protocol):
    """Writes, names, keeps and deletes the checkpoints of a run."""

    @property
    def path(self) -> Location:
        """Where it is."""

    def refusal(self, problem: str) -> str:
        """Return the message of a run that ends because checkpoints cannot be written."""

    def begin(self, name: str) -> None:
        """Make room for the files of a checkpoint, which is none before `commit`.

        Raises:
            OSError: If it cannot be written.
        """

    def writer(self, name: str) -> FileSystemWriter:
        """Return DCP's writer of this rank's tensors."""

    def written(self, name: str, rank: int) -> dict[str, FileEntry]:
        """Return the entries of the files that this rank has written, for the manifest.

        Raises:
            OSError: If they cannot be read.
        """

    def commit(
        self, name: str, manifest: Manifest, texts: Mapping[str, bytes], files: dict[str, FileEntry]
    ) -> None:
        """Complete the files that all ranks have written to a checkpoint.

        Args:
            name: Of the checkpoint.
            manifest: Its manifest, but for the files.
            texts: The files of its tokenizer, by name.
            files: What `written` has returned, of all ranks.

        Raises:
            OSError: If it cannot be written.
        """

    def discard(self, name: str) -> None:
        """Delete what has been written of a checkpoint that failed, where that is possible."""

    def clean_up(self) -> None:
        """Delete checkpoints that a kill left half written.

        Raises:
            ValueError: If the folder cannot be changed.
        """

    def set_aside(self, name: str, suffix: str) -> None:
        """Keep a checkpoint from being resumed from.

        Raises:
            ValueError: If the folder cannot be changed.
        """

    def prune(self, keep_latest: int, keep_every_steps: int) -> None:
        """Delete all checkpoints but the newest `keep_latest` and every `keep_every_steps`-th step.

        Of those set aside, the newest of each kind is kept. `keep_latest` 0 deletes nothing.
        """

    def explain(self, error: BaseException, needed_bytes: int) -> str:
        """Describe why a checkpoint could not be written.

        Args:
            error: An OSError, or what DCP raises on every rank for any error on one.
            needed_bytes: Size of its tensors.
        """


def superseded(steps: list[int], keep_latest: int, keep_every_steps: int) -> list[int]:
    """Return which of these steps, ascending, `prune` deletes."""
    return [
        step for step in steps[:-keep_latest] if not keep_every_steps or step % keep_every_steps
    ]


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
