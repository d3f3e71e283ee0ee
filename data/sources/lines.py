"""Lines of a file, plain or compressed, of bounded length."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from io import BufferedIOBase

from data.faults import Faults
from data.sources.source import Source

MAX_DOCUMENT_BYTES = 2**28
"""A longer line is skipped; a longer text file is several documents."""

TOO_LONG = "longer than 268 MB"

_PART_BYTES = 2**24


def read_line(file: BufferedIOBase) -> bytes | None:
    """Return the next line, empty at the end of the file; None for one that is too long."""
    line = file.readline(MAX_DOCUMENT_BYTES)
    if len(line) < MAX_DOCUMENT_BYTES:
        return line
    if not line.endswith(b"\n"):
        _skip_line(file)
    return None


def read_lines(source: Source, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a plain or gzipped file; a torn gzip file ends at its last.

    Of a part of a plain file those that begin in it, numbered from its start; `faults.lines_read`
    is their number at the end.
    """
    path, name, number = source.path, source.name, 0
    start, end = source.part or (0, None)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            if start:
                file.seek(start - 1)
                _skip_line(file)
            position = file.tell() if end is not None else 0
            while (end is None or position < end) and (line := read_line(file)) != b"":
                number += 1
                if end is not None:
                    position = file.tell()
                if line is None:
                    faults.add(TOO_LONG, f"{name}:{number}")
                else:
                    is_first = number == 1 and start == 0
                    yield number, line.removeprefix(codecs.BOM_UTF8) if is_first else line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        faults.add("torn or damaged gzip file, the rest of it", f"{name}:{number + 1}")
    faults.lines_read = number


def _skip_line(file: BufferedIOBase) -> None:
    while (line := file.readline(_PART_BYTES)) and not line.endswith(b"\n"):
        pass
