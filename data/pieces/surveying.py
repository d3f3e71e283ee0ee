"""The first pass over a piece, in any process: what it holds, written to files of its own.

Independent of the other pieces and of tokens.
"""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from data.faults import Faults
from data.pieces.near_duplicates import sketch
from data.pieces.plan import Piece
from data.pieces.sample import Sample, write_chunks
from data.pieces.units import DOCUMENT, KEY, Unit, write_array, writing_text, written_aside
from data.row_layout import Document, RowLayout
from data.sources.documents import read_sources
from data.text_keys import text_key

KEPT_TEXT_BYTES = 2**24
"""Text of a unit whose text is kept."""


@dataclass(frozen=True)
class PieceRecord:
    """What is written last of a piece: once it is there, so are the files of its units."""

    units: int
    documents: int
    text_bytes: int
    lines_read: int
    """Of the file of lines of which the piece is a part."""
    faults: dict[str, int]
    faults_at: dict[str, list[str]]


def read_record(folder: Path, number: int) -> PieceRecord:
    """Return the record of a piece that is surveyed."""
    return PieceRecord(**json.loads(_record_path(folder, number).read_bytes()))


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


@dataclass
class SurveyPiece:
    """Surveys a piece where it is called; nothing where that has been done.

    Args:
        folder: of the files.
        layout: the fields of rows.
        sample_bytes: size of the tokenizer's sample; 0 for none.
        drop_duplicates: whether equal documents count once in it.
        sketches: whether to make those by which near duplicates are found.
        kept_text_bytes: a unit whose text is kept ends with the document that reaches these.
    """

    folder: Path
    layout: RowLayout
    sample_bytes: int
    drop_duplicates: bool
    sketches: bool = False
    kept_text_bytes: int = field(default_factory=lambda: KEPT_TEXT_BYTES)
    _sample: Sample = field(init=False)

    def __post_init__(self) -> None:
        # One for all pieces of a process: what is not in the sample of several is in none.
        self._sample = Sample(self.sample_bytes, distinct=self.drop_duplicates)

    def __call__(self, numbered: tuple[int, Piece]) -> int:
        """Survey the piece of this number; return the bytes of its text."""
        number, piece = numbered
        if _record_path(self.folder, number).exists():
            return read_record(self.folder, number).text_bytes
        faults = Faults()
        documents = read_sources(piece.sources, faults, self.layout)
        found = [self._survey(Unit(piece, number), documents)]
        while piece.is_kept and found[-1][1] >= self.kept_text_bytes:
            found.append(self._survey(Unit(piece, number, len(found)), documents))
        record = PieceRecord(
            units=len(found),
            documents=sum(count for count, _ in found),
            text_bytes=sum(size for _, size in found),
            lines_read=faults.lines_read,
            faults=dict(faults.counts),
            faults_at=faults.examples,
        )
        with written_aside(_record_path(self.folder, number)) as file:
            file.write(json.dumps(dataclasses.asdict(record)).encode())
        return record.text_bytes

    def _survey(self, unit: Unit, documents: Iterator[Document]) -> tuple[int, int]:
        """Survey a unit; return the number of its documents and the bytes of their text."""
        digests, sizes, seen = bytearray(), array("Q"), set[bytes]()
        text_bytes = 0
        with ExitStack() as stack:
            keep = None
            if unit.piece.is_kept:
                keep = stack.enter_context(writing_text(unit.path(self.folder, "text")))
            sketches: IO[bytes] | None = None
            if self.sketches:
                sketches = stack.enter_context(written_aside(unit.path(self.folder, "sketches")))
            for document in documents:
                encoded = document.text.encode()
                digest = hashlib.sha256(encoded).digest()
                digests += digest
                sizes.append(len(encoded))
                text_bytes += len(encoded)
                self._sample.add(text_key(digest), document.text, len(encoded))
                if sketches and (key := digest[:8]) not in seen:
                    seen.add(key)
                    sketches.write(sketch(document.text))
                if keep:
                    keep(document)
                    if text_bytes >= self.kept_text_bytes:
                        break
        table = np.empty(len(sizes), DOCUMENT)
        table["digest"] = np.frombuffer(digests, "u1").reshape(-1, 32)
        table["bytes"] = sizes
        write_array(unit.path(self.folder, "documents"), table)
        write_array(unit.path(self.folder, "keys"), _keys(table))
        write_chunks(unit.path(self.folder, "sample"), self._sample.take_new())
        return len(table), text_bytes


def _keys(documents: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return the texts of some documents, sorted by their key."""
    keys = np.ascontiguousarray(documents["digest"][:, :8]).view(">u8").ravel()
    distinct, firsts, inverse = np.unique(keys, return_index=True, return_inverse=True)
    table = np.zeros(len(distinct), KEY)
    table["key"], table["first"] = distinct, firsts
    table["bytes"] = documents["bytes"][firsts]
    np.add.at(table["all_bytes"], inverse, documents["bytes"])
    return table
