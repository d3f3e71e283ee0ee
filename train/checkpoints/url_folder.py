"""Checkpoints in an object store, which has no renaming: files first, the manifest last.

A folder without its manifest is no checkpoint. One that is set aside keeps its files, and its
manifest as `manifest.json.damaged` or `manifest.json.abandoned`, until the same step is written
again. Files are hashed as they are written, and never read back but for their sizes.
"""

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from data.urls import Url, UrlError
from models.checkpoint_format import MANIFEST, FileEntry, Manifest, checkpoint_steps
from models.url_streams import UrlStreams
from train.checkpoints.folder import ABANDONED, DAMAGED, first_failure, superseded

logger = logging.getLogger(__name__)


class UrlFolder:
    """A `CheckpointFolder` in an object store."""

    def __init__(self, url: Url) -> None:
        self.path = url
        self._streams = HashedStreams()

    def begin(self, name: str) -> None:
        """Delete what is there under this name, its manifest first."""
        (self.path / name / MANIFEST).remove()
        (self.path / name).remove_folder()

    def writer(self, name: str) -> FileSystemWriter:
        """Return DCP's writer to the URL, whose streams note sizes and digests."""
        # Syncing would be `os.sync`, of every file system of the machine.
        writer = FsspecWriter(str(self.path / name), sync_files=False)
        self._streams = HashedStreams()
        writer.fs = self._streams  # type: ignore[assignment]
        return writer

    def written(self, name: str, rank: int) -> dict[str, FileEntry]:
        """Return what was noted while this rank wrote, `.metadata` too on the one that wrote it."""
        return self._streams.entries

    def commit(
        self, name: str, manifest: Manifest, texts: Mapping[str, bytes], files: dict[str, FileEntry]
    ) -> None:
        """Write the tokenizer, compare the sizes in the store, and write the manifest."""
        folder = self.path / name
        for text, content in texts.items():
            (folder / text).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files = {**files, text: {"bytes": len(content), "sha256": digest}}
        there, sizes = folder.files(), {name: entry["bytes"] for name, entry in files.items()}
        if there != sizes:
            name = min({*there.items()} ^ {*sizes.items()})[0]
            raise UrlError(
                f"{folder / name} has {there.get(name, 0)} bytes in the store, but "
                f"{sizes.get(name, 0)} were written, let no other job write there"
            )
        (folder / MANIFEST).write_bytes(replace(manifest, files=files).content())

    def discard(self, name: str) -> None:
        """Delete the files, if the store is there; else the next start does."""
        try:
            self.begin(name)
        except UrlError as error:
            logger.info("checkpoint: what was written of %s is left: %s", name, error)

    def clean_up(self) -> None:
        """Delete folders that have no manifest and are not set aside."""
        for name, files in self._without_manifest().items():
            if not _set_aside_as(files):
                (self.path / name).remove_folder()

    def set_aside(self, name: str, suffix: str) -> None:
        """Rename the manifest."""
        manifest = self.path / name / MANIFEST
        manifest.copy_to(Url(f"{manifest}{suffix}"))
        manifest.remove()

    def prune(self, keep_latest: int, keep_every_steps: int) -> None:
        """Delete old checkpoints; one that cannot be deleted is a warning."""
        if not keep_latest:
            return
        try:
            steps = checkpoint_steps(self.path)
            old = superseded([*steps], keep_latest, keep_every_steps)
            names = [steps[step].name for step in old]
            aside = {name: _set_aside_as(f) for name, f in self._without_manifest().items()}
            for suffix in (DAMAGED, ABANDONED):
                names += sorted(name for name, kind in aside.items() if kind == suffix)[:-1]
            for name in names:
                self.begin(name)
        except UrlError as error:
            logger.warning("checkpoint: could not delete an old one: %s", error)

    def refusal(self, problem: str) -> str:
        """Go on from the remedy in the problem itself."""
        return f"checkpoint: {problem}, then start the run again"

    def explain(self, error: BaseException, needed_bytes: int) -> str:
        """Return the line of the error, which names the URL."""
        return str(first_failure(error))

    def _without_manifest(self) -> dict[str, list[str]]:
        """Return {name: its files} of the folders of steps that are no checkpoints."""
        found = {}
        for name in self.path.folders():
            files = list((self.path / name).files())
            if name.startswith("step-") and MANIFEST not in files:
                found[name] = files
        return found


def _set_aside_as(files: list[str]) -> str:
    """Return the suffix of a checkpoint that is set aside; empty for one that is half written."""
    return next((s for s in (DAMAGED, ABANDONED) if MANIFEST + s in files), "")


class HashedStreams(UrlStreams):
    """DCP's streams to URLs, noting what is written: {name: size and sha256}."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; what is written to it is noted once it is there."""
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            stream = _Hashed(raw, str(path))
            yield stream
            stream.close()
        self.entries[os.path.basename(path)] = stream.entry

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, as DCP does with `.metadata`."""
        super().rename(path, new_path)
        self.entries[os.path.basename(new_path)] = self.entries.pop(os.path.basename(path))


class _Hashed(io.RawIOBase):
    """A stream to `raw` that hashes what passes."""

    def __init__(self, raw: Any, name: str) -> None:
        self.name = name
        self._raw, self._digest, self._bytes = raw, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Do nothing: a store takes parts of its own size."""

    def close(self) -> None:
        self._raw.close()
        super().close()

    @property
    def entry(self) -> FileEntry:
        """Size and digest, for the manifest."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
