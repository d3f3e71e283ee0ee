"""Reading documents out of files: text, source code, JSON lines, Parquet, saved datasets.

Yields documents one by one in a fixed order. What cannot be used is skipped, counted by reason
and reported with its file and line. Independent of tokens.
"""

import codecs
import glob
import gzip
import importlib.util
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from data.faults import UNKNOWN_KIND, Faults
from data.hugging_face_datasets import PREFIX, check_columns, read_rows
from data.row_layout import Document, RowLayout, sound_document

EMBEDDED = "embedded"
"""The input on every machine: the sources of the running Python and of torch."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")

MAX_DOCUMENT_BYTES = 2**28
"""A longer line is skipped; a longer text file is several documents, see `read_documents`."""

_TEXT_PART_BYTES = 2**24

_TOO_LONG = "longer than 268 MB"

_NOT_EMBEDDED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
_PARQUET_BATCH_ROWS = 64  # They are in memory at once, and a row may be a book.


def read_documents(inputs: Iterable[str], faults: Faults, layout: RowLayout) -> Iterator[Document]:
    """Yield the documents of all inputs, in the order given and sorted within each.

    Args:
        inputs: files, folders (recursive, without hidden entries), globs, `embedded`, or a
            Hugging Face dataset, see `data.hugging_face_datasets`.
            .txt .md .rst .py hold one document per file, .jsonl .jsonl.gz one per line,
            .parquet one per row. A text file above MAX_DOCUMENT_BYTES is cut at line ends into
            documents of 16 MB.
        faults: counts what is skipped.
        layout: the JSON fields or Parquet columns that hold the text.

    Raises:
        ValueError: an input does not exist, is of an unknown kind, has no such column, or has no
            fields for the prompt and response of `layout`.
    """
    files = [entry for source in inputs for entry in _list_files(source, faults)]
    for path, name in files:
        if name.startswith(PREFIX):
            documents = _read_dataset(name, layout, faults)
        elif path.suffix in TEXT_SUFFIXES:
            if layout.response:
                raise ValueError(f"input {name} has no fields to make pairs of, give JSON lines")
            documents = _read_text(path, name, faults)
        elif path.suffix == ".parquet":
            documents = _read_parquet(path, name, layout, faults)
        else:
            documents = _read_json_lines(path, name, layout, faults)
        yield from (document for document in documents if document is not None)


def _list_files(source: str, faults: Faults) -> Iterator[tuple[Path, str]]:
    """Yield the files of one input and the names to report them by."""
    if source == EMBEDDED:
        yield from _list_embedded()
        return
    if source.startswith(PREFIX):
        yield Path(), source
        return
    path = Path(source)
    if path.is_file():
        if not source.endswith(SUFFIXES):
            raise ValueError(f"input {source} is of an unknown kind, give {' '.join(SUFFIXES)}")
        yield path, source
        return
    found = [path] if path.is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not found:
        raise ValueError(f"input {source} does not exist, give a file, a folder or a glob")
    for entry in found:
        for file in _walk(entry) if entry.is_dir() else [entry]:
            if not file.is_file():  # Reading a pipe would block.
                faults.add("neither a file nor a folder, or a link to a folder", str(file))
            elif file.name.endswith(SUFFIXES):
                yield file, str(file)
            else:
                faults.add(UNKNOWN_KIND, str(file))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, without hidden files and folders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def _list_embedded() -> list[tuple[Path, str]]:
    """List the .py files of the standard library and of torch, without their tests."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    spec = importlib.util.find_spec("torch")  # Finds the package without importing it.
    if spec is not None and spec.origin is not None:
        roots["torch"] = Path(spec.origin).parent
    files = []
    for package, root in roots.items():
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _NOT_EMBEDDED]
            paths = [Path(folder, name) for name in names if name.endswith(".py")]
            files += [(path, f"{package}/{path.relative_to(root).as_posix()}") for path in paths]
    return sorted(files, key=lambda entry: entry[1])


def _read_text(path: Path, name: str, faults: Faults) -> Iterator[Document | None]:
    """Yield the one document of a text file, or the parts of a very long one."""
    for line, content in _text_parts(path, name, faults):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line += content.count(b"\n", 0, error.start)
            faults.add("invalid UTF-8", f"{name}:{line}")
        else:
            yield sound_document(text, name if line == 1 else f"{name}:{line}", faults)


def _text_parts(path: Path, name: str, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Yield the content of a text file and its first line; a very long one in parts."""
    if path.stat().st_size <= MAX_DOCUMENT_BYTES:
        yield 1, path.read_bytes().removeprefix(codecs.BOM_UTF8)
        return
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        line = 1
        while part := file.read(_TEXT_PART_BYTES):
            rest = _read_line(file)
            lines = part.count(b"\n")
            if rest is None:
                faults.add(_TOO_LONG, f"{name}:{line + lines}")
            else:
                yield line, part + rest
            line += lines + 1


def _read_line(file: BufferedIOBase) -> bytes | None:
    """Return the next line, empty at the end of the file; None for one that is too long."""
    line = file.readline(MAX_DOCUMENT_BYTES)
    if len(line) < MAX_DOCUMENT_BYTES:
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(_TEXT_PART_BYTES)
    return None


def _read_json_lines(
    path: Path, name: str, layout: RowLayout, faults: Faults
) -> Iterator[Document | None]:
    """Yield one document per line; blank lines are no fault."""
    for number, line in _lines(path, name, faults):
        if not line.strip():
            continue
        origin = f"{name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            faults.add("invalid UTF-8", origin)
            continue
        except (ValueError, RecursionError):
            faults.add("malformed JSON", origin)
            continue
        yield layout.document(row, origin, faults)


def _read_dataset(name: str, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield one document per row."""
    for number, row in read_rows(name, layout):
        yield layout.document(row, f"{name}:{number}", faults)


def _lines(path: Path, name: str, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a plain or gzipped file; a torn gzip file ends at its last."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while (line := _read_line(file)) != b"":
                number += 1
                if line is None:
                    faults.add(_TOO_LONG, f"{name}:{number}")
                else:
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        faults.add("torn or damaged gzip file, the rest of it", f"{name}:{number + 1}")


def _read_parquet(
    path: Path, name: str, layout: RowLayout, faults: Faults
) -> Iterator[Document | None]:
    """Yield one document per row."""
    import pyarrow  # Imported here: a slow import that only this kind of file needs.

    row = 0
    try:
        for values in _rows(path, name, layout):
            row += 1
            yield _row_document(values, f"{name}:{row}", layout, faults)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"input {name} cannot be read after row {row}, remove or replace it ({error})"
        ) from error


def _rows(path: Path, name: str, layout: RowLayout) -> Iterator[dict[str, bytes | None]]:
    """Yield some columns of a Parquet file row by row, as bytes."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"input {name} is not a Parquet file, remove or replace it") from error
    texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
    check_columns(name, columns, texts, layout)
    fields = layout.fields
    for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=list(fields)):
        values = []
        for field in fields:
            column = batch.column(field)
            try:
                # As bytes, so that one row of invalid UTF-8 does not fail its whole batch.
                values.append(column.cast(pyarrow.large_binary()))
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"{layout.naming(field)} of {name} holds {column.type}, give a column of text"
                ) from error
        for row in zip(*values, strict=True):
            yield {field: value.as_py() for field, value in zip(fields, row, strict=True)}


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
    values: dict[str, bytes | None], origin: str, layout: RowLayout, faults: Faults
) -> Document | None:
    """Return the document of one row, if it is sound."""
    texts = {}
    for field, value in values.items():
        if value is None:
            continue
        if len(value) > MAX_DOCUMENT_BYTES:
            faults.add(_TOO_LONG, origin)
            return None
        try:
            texts[field] = value.decode("utf-8")
        except UnicodeDecodeError:
            faults.add("invalid UTF-8", origin)
            return None
    return layout.document(texts, origin, faults)
