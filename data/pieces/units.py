"""The files of a unit: documents in a row, which one process surveys, and one encodes.

A unit is a piece of `data.pieces.plan`, or a part of one whose text is kept. Files are written
aside and renamed: one that is there is whole.
"""

import io
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.faults import Faults
from data.pieces.plan import Piece
from data.row_layout import Document, RowLayout
from data.sources.documents import read_sources

DOCUMENT = np.dtype([("digest", "u1", 32), ("bytes", "<u8")])
"""What the survey keeps of a document: the sha256 and the size of its text."""

KEY = np.dtype([("key", "<u8"), ("first", "<u4"), ("bytes", "<u8"), ("all_bytes", "<u8")])
"""What it keeps of a text, sorted by its key: the number of the first document, from 0 in the unit,
its size, and that of all documents with this text."""

ENCODED = np.dtype([("is_held_out", "?"), ("tokens", "<u8"), ("bytes", "<u8")])
"""What is kept of an encoded document, beside its tokens."""


_BLOCK_BYTES = 2**20


class Unit(NamedTuple):
    """Documents in a row."""

    piece: Piece
    number: int
    """Of the piece, from 0."""
    part: int = 0
    """Of the piece, from 0."""

    def path(self, folder: Path, kind: str) -> Path:
        """Return a file of the unit: documents, keys, sample, text, kept, train, encoded, ..."""
        return folder / f"{self.number:06d}-{self.part:04d}.{kind}"


def read_unit(unit: Unit, folder: Path, layout: RowLayout) -> Iterator[Document]:
    """Yield the documents of a unit that is surveyed."""
    if not unit.piece.is_kept:
        return read_sources(unit.piece.sources, Faults(), layout)
    return read_text(unit.path(folder, "text"))


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when all is written."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("wb") as file:
            yield file
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write the bytes of an array."""
    with written_aside(path) as file:
        file.write(array.tobytes())


def read_array(
    path: Path, dtype: np.dtype[Any], start: int = 0, end: int | None = None
) -> npt.NDArray[Any]:
    """Return an array that `write_array` wrote, or some rows of it."""
    count = -1 if end is None else end - start
    return np.fromfile(path, dtype, count, offset=start * dtype.itemsize)


def map_array(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return an array that `write_array` wrote, read where it is used."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def read_text(path: Path) -> Iterator[Document]:
    """Yield the documents that `writing_text` wrote."""
    import pyarrow  # Imported here: a slow import that only text that is kept needs.

    with pyarrow.input_stream(str(path), compression="zstd", buffer_size=_BLOCK_BYTES) as file:
        for line in io.BufferedReader(file, _BLOCK_BYTES):
            yield Document(*json.loads(line))


@contextmanager
def writing_text(path: Path) -> Iterator[Callable[[Document], object]]:
    """Open a compressed file of documents; yields the function that adds one."""
    import pyarrow

    with written_aside(path) as file, pyarrow.CompressedOutputStream(file, "zstd") as compressed:
        buffer = io.BufferedWriter(compressed, _BLOCK_BYTES)
        yield lambda document: buffer.write(json.dumps(astuple(document)).encode() + b"\n")
        buffer.flush()
