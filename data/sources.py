"""Reading documents out of files: text, source code, JSON lines, Parquet.

Yields documents one by one in a fixed order. What cannot be used is skipped, counted by reason
and reported with its file and line. Knows nothing of tokens.
"""

import codecs
import glob
import gzip
import importlib.util
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

EMBEDDED = "embedded"
"""The input that is always there: the sources of the running Python and of torch."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")

_NOT_EMBEDDED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
_PARQUET_BATCH_ROWS = 1024

# Half a surrogate pair, which a JSON escape can put into a str, has no UTF-8 form.
_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True)
class Document:
    """One text, and where it came from: a path, or a path and a line or row."""

    origin: str
    text: str


@dataclass
class Faults:
    """What was skipped, counted by reason, with the first few places of each."""

    max_examples: int = 3
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, origin: str) -> None:
        """Count one fault."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.max_examples:
            examples.append(origin)

    def lines(self) -> list[str]:
        """Return one line per reason: the count, the reason, the first places."""
        return [
            f"skipped {count}: {reason} ({', '.join(self.examples[reason])}"
            f"{', ...' if count > len(self.examples[reason]) else ''})"
            for reason, count in sorted(self.counts.items())
        ]


def read_documents(
    inputs: Iterable[str], faults: Faults, *, text_field: str = "text"
) -> Iterator[Document]:
    """Yield the documents of all inputs, in the order given and sorted within each.

    Args:
        inputs: files, folders (recursive, without hidden entries), globs, or `embedded`.
            .txt .md .rst .py hold one document per file, .jsonl .jsonl.gz one per line,
            .parquet one per row.
        faults: receives what is skipped.
        text_field: the JSON field or Parquet column that holds the text.

    Raises:
        ValueError: an input does not exist, is of an unknown kind, or has no such column.
    """
    files = [entry for source in inputs for entry in _list_files(source, faults)]
    for path, name in files:
        if path.suffix in TEXT_SUFFIXES:
            documents = _read_text(path, name, faults)
        elif path.suffix == ".parquet":
            documents = _read_parquet(path, name, text_field, faults)
        else:
            documents = _read_json_lines(path, name, text_field, faults)
        yield from documents


def _list_files(source: str, faults: Faults) -> Iterator[tuple[Path, str]]:
    """Yield the files of one input and the names to report them by."""
    if source == EMBEDDED:
        yield from _list_embedded()
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
            if file.name.endswith(SUFFIXES):
                yield file, str(file)
            else:
                faults.add("unknown file kind", str(file))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, without hidden files and folders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file():
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


def _read_text(path: Path, name: str, faults: Faults) -> Iterator[Document]:
    """Yield the one document of a text file."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        faults.add("invalid UTF-8", f"{name}:{line}")
        return
    yield from _document(text, name, faults)


def _read_json_lines(path: Path, name: str, text_field: str, faults: Faults) -> Iterator[Document]:
    """Yield one document per line; blank lines are no fault."""
    for number, line in enumerate(_lines(path, name, faults), start=1):
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
        if not isinstance(row, dict) or text_field not in row:
            faults.add(f"no field '{text_field}'", origin)
        elif not isinstance(row[text_field], str):
            faults.add(f"field '{text_field}' is not a string", origin)
        else:
            yield from _document(row[text_field], origin, faults)


def _lines(path: Path, name: str, faults: Faults) -> Iterator[bytes]:
    """Yield the lines of a plain or gzipped file; a torn gzip file ends at its last whole line."""
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield from file
        return
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        faults.add("torn gzip file, the rest of it", f"{name}:{number + 1}")


def _read_parquet(path: Path, name: str, text_field: str, faults: Faults) -> Iterator[Document]:
    import pyarrow  # Imported here: a slow import that only this kind of file needs.
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"input {name} is not a Parquet file, remove or replace it") from error
    columns = file.schema_arrow.names
    if text_field not in columns:
        raise ValueError(
            f"text_field {text_field} is no column of {name}, give one of: {', '.join(columns)}"
        )
    row = 0
    for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_field]):
        try:
            # As bytes, so that one row of invalid UTF-8 does not take its batch with it.
            values = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise ValueError(
                f"text_field {text_field} of {name} holds {batch.column(0).type},"
                " give a column of text"
            ) from error
        for value in values:
            row += 1
            origin = f"{name}:{row}"
            if value is None:
                faults.add(f"no field '{text_field}'", origin)
                continue
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                faults.add("invalid UTF-8", origin)
                continue
            yield from _document(text, origin, faults)


def _document(text: str, origin: str, faults: Faults) -> Iterator[Document]:
    """Yield the document if its text is sound, else count the fault."""
    if not text.strip():
        faults.add("empty document", origin)
    elif "\0" in text:
        faults.add("NUL character", origin)
    elif _SURROGATE.search(text):
        faults.add("invalid UTF-8", origin)
    else:
        yield Document(origin, text)
