"""Lines of a file, plain or compressed, of bounded length."""

import codecs
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import PurePath

from data.faults import Faults
from data.sources.compression import SUFFIXES, Content, open_content
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
    """Yield the numbered lines of a file; a torn compressed file ends at its last whole line.

    Of a part of a plain file those that begin in it, numbered from its start; `faults.lines_read`
    is their number at the end.
    """
    name, number = source.name, 0
    start, end = source.part or (0, None)
    with open_content(source) as file:
        if start:
            file.seek(start - 1)
            _skip_line(file)
        position = file.tell() if end is not None else 0
        while (end is None or position < end) and (line := read_line(file)) != b"":
            if file.is_torn and line is not None and not line.endswith(b"\n"):
                break
            number += 1
            if end is not None:
                position = file.tell()
            if line is None:
                faults.add(TOO_LONG, f"{name}:{number}")
            else:
                is_first = number == 1 and start == 0
                yield number, line.removeprefix(codecs.BOM_UTF8) if is_first else line
        count_tear(file, source, faults, f":{number + 1}")
    faults.lines_read = number


def count_tear(file: Content, source: Source, faults: Faults, where: str = "") -> None:
    """Count the fault of a file whose end was reached too early."""
    if file.is_torn:
        kind = SUFFIXES[PurePath(source.file_name).suffix]
        faults.add(f"torn or damaged {kind} file, the rest of it", source.name + where)


def _skip_line(file: BufferedIOBase) -> None:
    while (line := file.readline(_PART_BYTES)) and not line.endswith(b"\n"):
        pass
