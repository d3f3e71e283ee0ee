"""Rows of token ids: a column of Parquet files or of saved datasets, a field of JSON lines."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from data.faults import EMPTY, Faults
from data.sources.kinds import kind_of
from data.sources.lines import read_lines
from data.sources.saved_datasets import PREFIX, is_saved_dataset, open_dataset_rows
from data.sources.source import Source

_BATCH_ROWS = 64

Ids = npt.NDArray[np.int64]


def read_token_rows(source: Source, field: str, faults: Faults) -> Iterator[Ids]:
    """Yield the ids of each row, (seq,) int64, as they stand.

    Args:
        source: .parquet, .jsonl, compressed or not, or a dataset of the `datasets` library.
        field: the column.
        faults: counts the rows that hold no ids.

    Raises:
        ValueError: it is of another kind, cannot be read, or has no such column of integers.
    """
    if source.name.startswith(PREFIX) or is_saved_dataset(source.path):
        rows = _dataset_rows(source, field)
    elif source.path.suffix == ".parquet":
        rows = _parquet_rows(source, field)
    elif kind_of(source.name) == ".jsonl":
        rows = _json_rows(source, field, faults)
    else:
        raise ValueError(
            f"input {source.name} has no rows of token ids, give Parquet, JSON lines, a saved "
            "dataset, or token files without tokens_field"
        )
    for number, value in rows:
        ids = _as_ids(value)
        if ids is None:
            faults.add(f"field '{field}' is no list of token ids", f"{source.name}:{number}")
        elif not len(ids):
            faults.add(EMPTY, f"{source.name}:{number}")
        else:
            yield ids


def _as_ids(value: object) -> Ids | None:
    if not isinstance(value, np.ndarray):
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            return None
        if any(abs(each) >= 2**63 for each in value):
            return None
    return np.asarray(value, dtype=np.int64)


def _json_rows(source: Source, field: str, faults: Faults) -> Iterator[tuple[int, object]]:
    for number, line in read_lines(source, faults):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            faults.add("malformed JSON", f"{source.name}:{number}")
            continue
        yield number, row.get(field) if isinstance(row, dict) else None


def _parquet_rows(source: Source, field: str) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(source.path)
        names = file.schema_arrow.names
        if field not in names or not _is_integers(file.schema_arrow.field(field).type):
            _refuse(source, field, names)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
            for value in batch.column(0):
                number += 1
                yield number, None if not value.is_valid else _integers(value.values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"input {source.name} cannot be read after row {number}, remove or replace it ({error})"
        ) from error


def _is_integers(kind: Any) -> bool:
    import pyarrow.types as types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and types.is_integer(kind.value_type)


def _integers(values: Any) -> Ids | None:
    if values.null_count:
        return None
    ids = values.to_numpy(zero_copy_only=False)
    return None if ids.dtype == np.uint64 and (ids >> 63).any() else ids.astype(np.int64)


def _dataset_rows(source: Source, field: str) -> Iterator[tuple[int, object]]:
    rows = open_dataset_rows(source.name)
    if rows.column_names is not None:
        if field not in rows.column_names:
            _refuse(source, field, rows.column_names)
        rows = rows.select_columns([field])
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row.get(field)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"input {source.name} cannot be read after row {number} ({error}), try again"
        ) from error


def _refuse(source: Source, field: str, columns: list[str]) -> None:
    raise ValueError(
        f"tokens_field {field} is no column of integers of {source.name}, give one of: "
        f"{', '.join(columns)}"
    )
