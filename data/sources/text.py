"""Text files and source code: a document each, a very long one several."""

import codecs
from collections.abc import Iterator

from data.faults import Faults
from data.row_layout import Document, RowLayout, sound_document
from data.sources.lines import MAX_DOCUMENT_BYTES, TOO_LONG, read_line
from data.sources.source import Source

_PART_BYTES = 2**24


def read_text(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield the one document of a text file, or the parts of a very long one.

    Raises:
        ValueError: the layout asks for pairs.
    """
    name = source.name
    if layout.response:
        raise ValueError(f"input {name} has no fields to make pairs of, give JSON lines")
    for line, content in _text_parts(source, faults):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line += content.count(b"\n", 0, error.start)
            faults.add("invalid UTF-8", f"{name}:{line}")
        else:
            yield sound_document(text, name if line == 1 else f"{name}:{line}", faults)


def _text_parts(source: Source, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Yield the content of a text file and its first line; a very long one in parts."""
    path = source.path
    if path.stat().st_size <= MAX_DOCUMENT_BYTES:
        yield 1, path.read_bytes().removeprefix(codecs.BOM_UTF8)
        return
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        line = 1
        while part := file.read(_PART_BYTES):
            rest = read_line(file)
            lines = part.count(b"\n")
            if rest is None:
                faults.add(TOO_LONG, f"{source.name}:{line + lines}")
            else:
                yield line, part + rest
            line += lines + 1
