"""One file of documents, or a part of it."""

from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A file of documents, or a dataset of the `datasets` library."""

    path: Path
    """Empty for a dataset."""
    name: str
    """For messages: the path as given, or hf:NAME[:SPLIT[:CONFIG]]."""
    part: tuple[int, int | None] | None = None
    """Of plain JSON lines the bytes in which a line begins, of Parquet the row groups: the first
    and that behind the last, None for the end of the file. None: the whole."""
