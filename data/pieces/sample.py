"""The sample of a corpus that a tokenizer is trained on: the chunks of text of smallest hash."""

import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.pieces.units import written_aside
from data.text_keys import text_digest

_CHUNK_CHARS = 16384


class Chunk(NamedTuple):
    """A part of a document; of two, the one of smaller hash is the greater."""

    minus_hash: int
    key: int
    """Of the document."""
    text: str
    document_bytes: int
    """Size of the document."""


class Sample:
    """The chunks of smallest hash, as many as reach a size: uniform, in one pass, without an RNG.

    What is in the sample of a corpus is in that of any part of it.

    Args:
        limit_bytes: size of the text; one chunk may go beyond.
        distinct: whether to take equal chunks of equal documents once.
    """

    def __init__(self, limit_bytes: int, *, distinct: bool = False) -> None:
        self._limit_bytes = limit_bytes
        self._size = 0
        self._heap: list[tuple[Chunk, int]] = []
        self._present: set[tuple[int, int]] | None = set() if distinct else None
        self._added = 0
        self._taken = 0

    def add(self, key: int, text: str, document_bytes: int) -> None:
        """Add the chunks of one document, as far as their hashes are among the smallest."""
        if not self._limit_bytes:
            return
        for start in range(0, len(text), _CHUNK_CHARS):
            part = text[start : start + _CHUNK_CHARS]
            # Other bits than the document's key, which are small for all documents held out.
            rank = int.from_bytes(text_digest(part)[8:16], "big")
            self.add_chunk(Chunk(-rank, key, part, document_bytes))

    def add_chunk(self, chunk: Chunk) -> None:
        """Add one chunk, if its hash is among the smallest."""
        if self._size >= self._limit_bytes and chunk < self._heap[0][0]:
            return
        if self._present is not None:
            if chunk[:2] in self._present:
                return
            self._present.add(chunk[:2])
        heapq.heappush(self._heap, (chunk, self._added))
        self._added += 1
        self._size += len(chunk.text.encode())
        while self._size - len(self._heap[0][0].text.encode()) >= self._limit_bytes:
            left = heapq.heappop(self._heap)[0]
            self._size -= len(left.text.encode())
            if self._present is not None:
                self._present.discard(left[:2])

    def chunks(self) -> list[Chunk]:
        """Return the chunks, in a fixed order."""
        return sorted(chunk for chunk, _ in self._heap)

    def take_new(self) -> list[Chunk]:
        """Return the chunks added since the last call that are still among the smallest."""
        taken, self._taken = self._taken, self._added
        return [chunk for chunk, number in self._heap if number >= taken]


def write_chunks(path: Path, chunks: Iterable[Chunk]) -> None:
    """Write chunks of a sample to a file."""
    with written_aside(path) as file:
        for chunk in chunks:
            file.write(json.dumps(chunk).encode() + b"\n")


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Yield the chunks in a file."""
    with path.open("rb") as file:
        for line in file:
            yield Chunk(*json.loads(line))
