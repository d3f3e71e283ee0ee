"""A JSON file that is no line each: an array of rows, or an object that is a row or holds rows.

An array is streamed, a row in memory at a time. JSON lines are often named .json too, and are read
as lines, of which a bad one costs no other.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from data.faults import UNKNOWN_KIND, Faults
from data.foreign_json import MAX_VALUES
from data.row_layout import Document, RowLayout
from data.sources.compression import Content, open_content
from data.sources.json_lines import read_json_lines
from data.sources.lines import MAX_DOCUMENT_BYTES, TOO_LONG, count_tear, read_line
from data.sources.source import Source

_BLOCK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield one document per row.

    The rows are the items of an array; an object itself, if it has a field of the layout; or else
    the objects in its lists, such as those of {"data": [...]}. Damage ends the file.
    """
    if _has_lines(source, layout):
        yield from read_json_lines(source, layout, faults)
        return
    number = 0
    with open_content(source) as file:
        try:
            for row in _rows(_Values(file), source, layout, faults):
                number += 1
                yield layout.document(row, f"{source.name}:{number}", faults)
        except _TooLongError:
            faults.add(f"{TOO_LONG}, the rest of it", f"{source.name}:{number + 1}")
        except (ValueError, RecursionError):
            if not file.is_torn:
                faults.add("malformed JSON, the rest of it", f"{source.name}:{number + 1}")
        count_tear(file, source, faults, f":{number + 1}")


def _has_lines(source: Source, layout: RowLayout) -> bool:
    """Whether the first line is a row by itself."""
    with open_content(source) as file:
        line = b"\n"
        while line and not line.strip():
            line = (read_line(file) or b"").removeprefix(codecs.BOM_UTF8)
    try:
        return line.lstrip()[:1] == b"{" and _is_row(json.loads(line), layout)
    except (ValueError, RecursionError):
        return False


def _is_row(value: object, layout: RowLayout) -> bool:
    return isinstance(value, dict) and any(field in value for field in layout.fields)


def _rows(values: "_Values", source: Source, layout: RowLayout, faults: Faults) -> Iterator[Any]:
    """Yield the rows of all values of a file: as a rule of the one it has."""
    while (first := values.peek()) != "":
        if first == "[":
            yield from values.items()
            continue
        value = values.take()
        lists = [] if _is_row(value, layout) or not isinstance(value, dict) else value.values()
        held = [row for each in lists if isinstance(each, list) for row in each]
        if rows := [row for row in held if isinstance(row, dict)]:
            yield from rows
        elif isinstance(value, dict) and not _is_row(value, layout):
            faults.add(UNKNOWN_KIND, source.name)
        else:
            yield value


class _TooLongError(ValueError):
    """A value has more text or values than a document may have."""


class _Values:
    """The JSON values of a file, each in memory by itself."""

    def __init__(self, file: Content) -> None:
        self._file = file
        # Bytes that are no UTF-8 cost the rows that have them, see `data.row_layout`.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self) -> Any:
        """Return the value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            if end < len(self._text) or not self._more():  # else a number may go on
                self._at = end
                return value

    def items(self) -> Iterator[Any]:
        """Yield the items of the array that begins here."""
        self._at += 1
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.take()
            mark = self.peek()
            self._at += 1
            if mark == "]":
                return
            if mark != ",":
                raise ValueError("no comma between values")

    def _more(self) -> bool:
        """Read on, at least as much as is held; whether there was more."""
        self._text, self._at = self._text[self._at :], 0
        held = len(self._text)
        if held > MAX_DOCUMENT_BYTES or self._text.count(",") > MAX_VALUES:
            raise _TooLongError
        block = self._file.read(max(held, _BLOCK_BYTES))
        self._text += self._decoder.decode(block, final=not block)
        return bool(block)
