"""Parquet files, a document per row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.faults import Faults
from data.row_layout import Document, RowLayout
from data.sources.compression import open_stored
from data.sources.lines import MAX_DOCUMENT_BYTES, TOO_LONG
from data.sources.saved_datasets import check_columns
from data.sources.source import Source

_BATCH_ROWS = 64  # They are in memory at once, and a row may be a book.


def read_parquet(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield one document per row.

    Raises:
        ValueError: it is not such a file, is damaged, or has no such column of text.
    """
    import pyarrow  # Imported here: a slow import that only this kind of file needs.

    name, row = source.name, 0
    try:
        for row, values in _rows(source, layout):
            yield _row_document(values, f"{name}:{row}", layout, faults)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"input {name} cannot be read after row {row}, remove or replace it ({error})"
        ) from error


def row_group_sizes(path: Path) -> list[int]:
    """Return the bytes of the row groups of a Parquet file; [] where that is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        return []  # What is wrong is raised where it is read.


def _rows(source: Source, layout: RowLayout) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row, from 1, and some columns of it, as bytes."""
    import pyarrow
    import pyarrow.parquet

    name = source.name
    try:
        file = pyarrow.parquet.ParquetFile(open_stored(source) if source.url else source.path)
        columns = file.schema_arrow.names
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"input {name} is not a Parquet file, remove or replace it") from error
    texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
    check_columns(name, columns, texts, layout)
    fields = layout.fields
    first, end = source.part or (0, None)
    groups = range(file.num_row_groups)[first:end]
    read = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
    batches = file.iter_batches(
        batch_size=_BATCH_ROWS, row_groups=list(groups), columns=list(fields)
    )
    for batch in batches:
        values = []
        for field in fields:
            column = batch.column(field)
            if layout.messages and not _is_text(column.type):
                values.append(column)
                continue
            try:
                # As bytes, so that one row of invalid UTF-8 does not fail its whole batch.
                values.append(column.cast(pyarrow.large_binary()))
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"{layout.naming(field)} of {name} holds {column.type}, give a column of text"
                ) from error
        for number, row in enumerate(zip(*values, strict=True), read + 1):
            yield number, {field: value.as_py() for field, value in zip(fields, row, strict=True)}
        read += len(batch)


def _is_text(kind: Any) -> bool:
    import pyarrow.types

    return any(
        is_kind(kind)
        for is_kind in (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_binary,
            pyarrow.types.is_large_binary,
            pyarrow.types.is_dictionary,
        )
    )


def _row_document(
    values: dict[str, Any], origin: str, layout: RowLayout, faults: Faults
) -> Document | None:
    """Return the document of one row, if it is sound."""
    texts: dict[str, Any] = {}
    for field, value in values.items():
        if value is None:
            continue
        if not isinstance(value, bytes):  # of a chat
            texts[field] = value
            continue
        if len(value) > MAX_DOCUMENT_BYTES:
            faults.add(TOO_LONG, origin)
            return None
        try:
            texts[field] = value.decode("utf-8")
        except UnicodeDecodeError:
            faults.add("invalid UTF-8", origin)
            return None
    return layout.document(texts, origin, faults)
