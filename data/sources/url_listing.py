"""The files of an input by URL: a file, a folder, a glob. Lists names; reads no file."""

from collections.abc import Iterator
from pathlib import Path

from data.faults import UNKNOWN_KIND, Faults
from data.sources.kinds import check_kind, kind_of
from data.sources.saved_datasets import has_markers
from data.sources.source import Source
from data.urls import Url, _connect, explained, location

_GLOB = set("*?[")


def list_urls(source: str, faults: Faults) -> Iterator[Source]:
    """Yield the files of one input, in the order in which those of a path are.

    Raises:
        ValueError: it does not exist, is of an unknown kind, or its store cannot be read.
    """
    url = location(source)
    assert isinstance(url, Url)
    found = Source(Path(), str(url))
    if not url.lists or (not _GLOB & {*source} and url.is_file()):
        check_kind(source, found.file_name)
        yield found
        return
    entries = _matches(url) if _GLOB & {*source} else [url]
    is_there = False
    for entry in entries:
        for file, is_saved in [(entry, False)] if entry.is_file() else _walk(entry):
            is_there = True
            if is_saved or kind_of(file.name):
                yield Source(Path(), str(file))
            else:
                faults.add(UNKNOWN_KIND, str(file))
    if not is_there:
        raise ValueError(f"input {source} does not exist, give a file, a folder or a glob")


def _walk(folder: Url) -> Iterator[tuple[Url, bool]]:
    """Yield the files below a folder in sorted order, without hidden files and folders.

    A folder that `save_to_disk` wrote is one of them, and marked.
    """
    files = folder.files()
    if has_markers(files):
        yield folder, True
        return
    for name in sorted({*files, *folder.folders()}):
        if name.startswith("."):
            continue
        if name in files:
            yield folder / name, False
        else:
            yield from _walk(folder / name)


def _matches(pattern: Url) -> list[Url]:
    """Return the files and folders whose URLs match a pattern, sorted."""
    with explained(pattern):
        names = sorted(_connect(pattern).glob(pattern.text))
    scheme = pattern.text.partition("://")[0]
    return [Url(f"{scheme}://{name.lstrip('/')}") for name in names]
