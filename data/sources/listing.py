"""The files of an input: a file, a folder, a glob, or the sources of Python and torch.

Lists names in a fixed order; reads no document.
"""

import glob
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.faults import UNKNOWN_KIND, Faults
from data.sources.compression import SUFFIXES as COMPRESSIONS
from data.sources.saved_datasets import PREFIX, is_saved_dataset
from data.sources.source import Source

EMBEDDED = "embedded"
"""The input on every machine: the sources of the running Python and of torch."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".html", ".htm", *ROW_SUFFIXES)
"""Of files that may be compressed; Parquet compresses by itself."""

_NOT_EMBEDDED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def kind_of(name: str) -> str | None:
    """Return the suffix of a file's name that names its kind, without that of its compression."""
    if name.endswith(".parquet"):
        return ".parquet"
    stem, dot, last = name.rpartition(".")
    plain = stem if dot + last in COMPRESSIONS else name
    return next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)


def list_sources(source: str, faults: Faults) -> Iterator[Source]:
    """Yield the files of one input, see `data.sources.documents.read_documents`.

    Raises:
        ValueError: it does not exist, or is of an unknown kind.
    """
    if source == EMBEDDED:
        yield from _list_embedded()
        return
    if source.startswith(PREFIX):
        yield Source(Path(), source)
        return
    path = Path(source)
    if path.is_file():
        if kind_of(source) is None:
            kinds = f"{' '.join(SUFFIXES)}, also with {' '.join(COMPRESSIONS)}, or .parquet"
            raise ValueError(f"input {source} is of an unknown kind, give {kinds}")
        yield Source(path, source)
        return
    found = [path] if path.is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not found:
        raise ValueError(f"input {source} does not exist, give a file, a folder or a glob")
    for entry in found:
        for file in _walk(entry) if entry.is_dir() else [entry]:
            if is_saved_dataset(file):
                yield Source(file, str(file))
            elif not file.is_file():  # Reading a pipe would block.
                faults.add("neither a file nor a folder, or a link to a folder", str(file))
            elif kind_of(file.name):
                yield Source(file, str(file))
            else:
                faults.add(UNKNOWN_KIND, str(file))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, without hidden files and folders.

    A folder that `save_to_disk` wrote is one of them.
    """
    if is_saved_dataset(folder):
        yield folder
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def _list_embedded() -> list[Source]:
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
            files += [
                Source(path, f"{package}/{path.relative_to(root).as_posix()}") for path in paths
            ]
    return sorted(files, key=lambda source: source.name)
