"""The pieces of a corpus: what one process reads at a time, a pure function of the input.

A piece is a run of small files, or a part of a large one that can be read from there on.
"""

from collections.abc import Iterable
from typing import NamedTuple

from data.faults import Faults
from data.sources.compression import SUFFIXES
from data.sources.kinds import TEXT_SUFFIXES
from data.sources.lines import MAX_DOCUMENT_BYTES
from data.sources.listing import list_sources
from data.sources.parquet import row_group_sizes
from data.sources.source import Source

LEAST_PIECE_BYTES = 2**20
MOST_PIECE_BYTES = 2**26
_PIECES = 256
"""So many where neither bound is met: for tens of processes, each with several."""

_COMPRESSED = tuple(SUFFIXES)
_COMPRESSION = 4
"""Text in a compressed file, about, as a multiple of its size."""


class Piece(NamedTuple):
    """What one process reads at a time."""

    sources: tuple[Source, ...]
    is_kept: bool = False
    """Whether the first pass keeps the text for the second: the source is long, or far away, and
    cannot be read from its middle on."""


def list_pieces(inputs: Iterable[str], faults: Faults) -> list[Piece]:
    """Return the pieces of all inputs, in the order of their documents.

    Args:
        inputs: as for `data.sources.documents.read_documents`.
        faults: counts what is no source.

    Raises:
        ValueError: an input does not exist, or is of an unknown kind.
    """
    sources = [entry for given in inputs for entry in list_sources(given, faults)]
    sizes = [*map(_text_bytes, sources)]
    piece_bytes = min(max(sum(sizes) // _PIECES, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)
    pieces: list[Piece] = []
    run: list[Source] = []
    run_bytes = 0
    for source, size in zip(sources, sizes, strict=True):
        parts = _parts(source, size, piece_bytes)
        if run and (parts or run_bytes >= piece_bytes):
            pieces.append(Piece(tuple(run)))
            run, run_bytes = [], 0
        pieces += parts
        if not parts:
            run.append(source)
            run_bytes += size
    return pieces + ([Piece(tuple(run))] if run else [])


def _text_bytes(source: Source) -> int:
    """Return about how much text a file holds; 0 for what is no file."""
    if not source.path.is_file():
        return 0
    factor = _COMPRESSION if source.path.name.endswith(_COMPRESSED) else 1
    return factor * source.path.stat().st_size


def _parts(source: Source, size: int, piece_bytes: int) -> list[Piece]:
    """Return the pieces of a source that shares none with others; [] for a small one."""
    if not source.path.is_file():
        return [Piece((source,), is_kept=True)]
    if size <= piece_bytes:
        return []
    if source.path.name.endswith(".jsonl"):
        starts = [*range(0, size, piece_bytes)]
        ends = [*starts[1:], None]
        return [Piece((source._replace(part=part),)) for part in zip(starts, ends, strict=True)]
    if source.path.name.endswith(".parquet"):
        return _row_groups(source, piece_bytes)
    is_one_document = source.path.name.endswith(TEXT_SUFFIXES) and size <= MAX_DOCUMENT_BYTES
    return [Piece((source,), is_kept=not is_one_document)]


def _row_groups(source: Source, piece_bytes: int) -> list[Piece]:
    """Return the pieces of a Parquet file: runs of its row groups."""
    pieces = []
    start, run_bytes = 0, 0
    sizes = row_group_sizes(source.path)
    for end, size in enumerate(sizes, 1):
        run_bytes += size
        if run_bytes >= piece_bytes or end == len(sizes):
            part = source._replace(part=(start, end))
            pieces.append(Piece((part,), is_kept=run_bytes > 4 * piece_bytes))
            start, run_bytes = end, 0
    return pieces or [Piece((source,))]
