"""Text files and source code: a document each, a very long one several."""

import codecs
from collections.abc import Iterator
from io import SEEK_END

from data.faults import Faults
from data.row_layout import Document, RowLayout, sound_document
from data.sources.compression import Content, open_content
from data.sources.lines import MAX_DOCUMENT_BYTES, TOO_LONG, count_tear, read_line
from data.sources.source import Source

_PART_BYTES = 2**24


def read_text(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield the one document of a text file, or the parts of a very long one.

    Raises:
        ValueError: the layout asks for fields.
    """
    refuse_fields(source, layout)
    name = source.name
    for line, content in _text_parts(source, faults):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line += content.count(b"\n", 0, error.start)
            faults.add("invalid UTF-8", f"{name}:{line}")
        else:
            yield sound_document(text, name if line == 1 else f"{name}:{line}", faults)


def refuse_fields(source: Source, layout: RowLayout) -> None:
    """Raise a ValueError if a document of more than one field is wanted of a file of text."""
    if layout.is_learnt_in_part:
        kind = "a chat" if layout.messages else "pairs"
        raise ValueError(f"input {source.name} has no fields to make {kind} of, give JSON lines")


def is_long(source: Source) -> bool:
    """Whether a file has more bytes than a document may have."""
    with open_content(source) as file:
        if file.seekable():
            return file.seek(0, SEEK_END) > MAX_DOCUMENT_BYTES
        size = 0
        while size <= MAX_DOCUMENT_BYTES and (part := file.read(2**20)):
            size += len(part)
        return size > MAX_DOCUMENT_BYTES


def read_whole(source: Source, faults: Faults) -> bytes:
    """Return the content of a file that is not long; of a torn one, its whole lines."""
    with open_content(source) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
        if file.is_torn:
            content = content[: content.rfind(b"\n") + 1]
            lines = content.count(b"\n")
            count_tear(file, source, faults, f":{lines + 1}")
        return content


def _text_parts(source: Source, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Yield the content of a text file and its first line; a very long one in parts."""
    if not is_long(source):
        yield 1, read_whole(source, faults)
        return
    with open_content(source) as file:
        yield from _parts_at_line_ends(file, source, faults)


def _parts_at_line_ends(
    file: Content, source: Source, faults: Faults
) -> Iterator[tuple[int, bytes]]:
    line, begin = 1, len(codecs.BOM_UTF8)
    if (first := file.read(begin)) == codecs.BOM_UTF8:
        first = b""
    while part := first + file.read(_PART_BYTES - len(first)):
        first = b""
        rest = read_line(file)
        lines = part.count(b"\n")
        if file.is_torn:
            whole = part + (rest or b"")
            if whole := whole[: whole.rfind(b"\n") + 1]:
                yield line, whole
            line += whole.count(b"\n")
            count_tear(file, source, faults, f":{line}")
            return
        if rest is None:
            faults.add(TOO_LONG, f"{source.name}:{line + lines}")
        else:
            yield line, part + rest
        line += lines + 1
