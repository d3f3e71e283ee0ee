"""CSV and TSV files with a header, a document per row."""

import csv
from collections.abc import Iterator
from pathlib import PurePath

from data.faults import EMPTY, Faults
from data.foreign_json import MAX_VALUES
from data.row_layout import Document, RowLayout
from data.sources.lines import MAX_DOCUMENT_BYTES, TOO_LONG, read_lines
from data.sources.saved_datasets import check_columns
from data.sources.source import Source


def read_table(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield one document per row under the header; quoted fields may hold anything.

    Raises:
        ValueError: the header has no such column.
    """
    name = source.name
    records = _records(source, faults)
    header = next((record for _, record in records), None)
    if header is None:
        faults.add(EMPTY, name)
        return
    texts = [column for column in header if column]
    check_columns(name, header, texts, layout)
    if twice := next((field for field in layout.fields if header.count(field) > 1), None):
        raise ValueError(f"{layout.naming(twice)} is twice in the header of {name}, rename one")
    for line, record in records:
        origin = f"{name}:{line}"
        if len(record) != len(header):
            faults.add("row with more or fewer fields than the header", origin)
            yield None
            continue
        yield layout.document(dict(zip(header, record, strict=True)), origin, faults)


def _records(source: Source, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line of each record and its fields; blank lines are no fault."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # of the process; else 131072
    delimiter = "\t" if ".tsv" in PurePath(source.file_name).suffixes else ","
    lines = _Lines(source, faults, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_record()
        try:
            record = next(reader)
        except StopIteration:
            return
        except _TooLongError:
            faults.add(f"{TOO_LONG}, the rest of it", f"{source.name}:{lines.first}")
            return
        except csv.Error:
            rest = ", the rest of it" if lines.ended else ""  # a quote without its end
            # Each line may have been a row.
            faults.add(f"malformed row{rest}", f"{source.name}:{lines.first}", lines.count)
            continue
        if record:
            yield lines.first, record


class _TooLongError(Exception):
    """A record has more text or fields than a document may have."""


class _Lines:
    """The lines of a file for `csv`, with the number of the first of each record."""

    def __init__(self, source: Source, faults: Faults, delimiter: str) -> None:
        self._lines = read_lines(source, faults)
        self._delimiter = delimiter.encode()
        self.ended = False
        self.begin_record()

    def begin_record(self) -> None:
        self.first = self.count = self._bytes = self._fields = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        try:
            number, line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        self.first = self.first or number
        self.count += 1
        self._bytes += len(line)
        self._fields += line.count(self._delimiter)
        if self._bytes > MAX_DOCUMENT_BYTES or self._fields > MAX_VALUES:
            raise _TooLongError
        return line.decode("utf-8", "surrogateescape")
