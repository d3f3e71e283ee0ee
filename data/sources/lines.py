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
    while line and not line.endswith(b"\n"):
        line = file.readline(_PART_BYTES)
    return None


def read_lines(source: Source, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a plain or gzipped file; a torn gzip file ends at its last."""
    path, name, number = source.path, source.name, 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while (line := read_line(file)) != b"":
                number += 1
                if line is None:
                    faults.add(TOO_LONG, f"{name}:{number}")
                else:
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        faults.add("torn or damaged gzip file, the rest of it", f"{name}:{number + 1}")
