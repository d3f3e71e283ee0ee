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
from data.sources.kinds import check_kind, kind_of
from data.sources.saved_datasets import PREFIX, is_saved_dataset
from data.sources.source import Source
from data.sources.url_listing import list_urls
from data.urls import is_url, location

EMBEDDED = "embedded"
"""The input on every machine: the sources of the running Python and of torch."""

_NOT_EMBEDDED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def list_sources(source: str, faults: Faults) -> Iterator[Source]:
    """Yield the files of one input, see `data.sources.documents.read_documents`.

    Raises:
        ValueError: it does not exist, or is of an unknown kind.
    """
    if source == EMBEDDED:
        yield from _list_embedded()
        return
    if is_url(source):
        yield from list_urls(source, faults)
        return
    if source.startswith(PREFIX):
        yield Source(Path(), source)
        return
    path = location(source)
    assert isinstance(path, Path)
    source = str(path) if "://" in source else source  # file://
    if path.is_file():
        check_kind(source, path.name)
        yield Source(path, source)
        return
    found = [path] if path.is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not found:
        raise ValueError(f"input {source} does not exist, give a file, a folder or a glob")
    for entry in found:
        for file in walk(entry) if entry.is_dir() else [entry]:
            if is_saved_dataset(file):
                yield Source(file, str(file))
            elif not file.is_file():  # Reading a pipe would block.
                faults.add("neither a file nor a folder, or a link to a folder", str(file))
            elif kind_of(file.name):
                yield Source(file, str(file))
            else:
                faults.add(UNKNOWN_KIND, str(file))


def walk(folder: Path) -> Iterator[Path]:
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
            yield from walk(entry)
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
