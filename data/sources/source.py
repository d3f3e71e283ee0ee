"""One file of documents, or a part of it."""

from pathlib import Path
from typing import NamedTuple

from data.urls import Url, is_url


class Source(NamedTuple):
    """A file of documents, or a dataset of the `datasets` library."""

    path: Path
    """Empty for a dataset, and for a file by URL."""
    name: str
    """For messages: the path as given, the URL, or hf:NAME[:SPLIT[:CONFIG]]."""
    part: tuple[int, int | None] | None = None
    """Of plain JSON lines the bytes in which a line begins, of Parquet the row groups: the first
    and that behind the last, None for the end of the file. None: the whole."""

    @property
    def url(self) -> Url | None:
        """The file, if it is one by URL."""
        return Url(self.name) if is_url(self.name) else None

    @property
    def file_name(self) -> str:
        """The name with the suffixes that tell the kind; of a URL without what follows `?`."""
        return self.name.partition("?")[0] if self.url else self.path.name
