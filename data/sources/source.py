"""One file of documents."""

from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A file of documents, or a dataset of the `datasets` library."""

    path: Path
    """Empty for a dataset."""
    name: str
    """For messages: the path as given, or hf:NAME[:SPLIT[:CONFIG]]."""
