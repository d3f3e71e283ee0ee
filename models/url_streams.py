"""Files by URL as torch.distributed.checkpoint (DCP) opens them, with errors of one line."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem

from data.urls import Url, UrlError, explained


class UrlStreams(FileSystem):
    """DCP's files by URL."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file.

        What fails while it is written leaves none: fsspec would complete it on closing.

        Raises:
            FileNotFoundError: There is no such file.
            UrlError: It cannot be read or written.
        """
        url = Url(str(path))
        with explained(url):
            stream = url.open(mode)
            try:
                yield stream  # type: ignore[misc]
                stream.close()
            except BaseException:
                with suppress(Exception):  # some stores have no such thing
                    stream.discard()  # type: ignore[attr-defined]
                    stream.closed = True  # type: ignore[misc]
                if mode == "wb":
                    with suppress(UrlError):
                        url.remove()
                raise

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: a store has no folders, and would make a bucket."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is such a file."""
        return Url(str(path)).is_file()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Copy a file, and remove it under the old name."""
        Url(str(path)).copy_to(Url(str(new_path)))
        Url(str(path)).remove()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Remove a file."""
        Url(str(path)).remove()
