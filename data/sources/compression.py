"""The bytes of a file, plain or compressed, up to its end or to where it is damaged.

Decompresses as it is read, so that a small file that unpacks to a large one needs no memory. All
frames or members of a file are read, one after the other.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, BinaryIO

from data.sources.source import Source
from data.urls import Url, UrlError, explained

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""The kinds of compression by the suffix of a file."""

_XZ_MEMORY_BYTES = 2**28
"""Four times what the highest level needs; a file may ask for 4 GiB."""


class Content(io.BufferedReader):
    """The content of a file; ends early where the compressed file is torn or damaged."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, 2**16)

    @property
    def is_torn(self) -> bool:
        """Whether the end that was reached is none of the file."""
        return isinstance(self.raw, _Decompressed) and self.raw.is_torn


def open_content(source: Source) -> Content:
    """Open a file of documents, decompressed where its suffix asks for that.

    Raises:
        OSError: it cannot be opened.
    """
    file = open_stored(source)
    opener = _OPENERS.get(PurePath(source.file_name).suffix)
    return Content(_Decompressed(file, opener) if opener else file)


def open_stored(source: Source) -> io.RawIOBase:
    """Open a file as it is stored, here or by URL, without a buffer.

    Raises:
        OSError: it cannot be opened.
    """
    return _Remote(source.url) if source.url else source.path.open("rb", buffering=0)


class _Remote(io.RawIOBase):
    """A file by URL."""

    def __init__(self, url: Url) -> None:
        self._url = url
        self._file: Any = url.open()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.size is not None  # else its server sends it from the start alone

    def readinto(self, buffer: Any) -> int:
        with explained(self._url):
            found = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with explained(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """What a file decompresses to, as far as it is sound."""

    def __init__(self, file: io.RawIOBase, opener: Callable[[Any], Any]) -> None:
        self._file = file
        self._stream = opener(file)
        self.is_torn = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.is_torn:
            return 0
        try:
            found = self._stream.read1(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError):
            self.is_torn = True
            return 0
        except OSError as error:
            if error.errno is not None or isinstance(error, UrlError):  # not of the format
                raise
            self.is_torn = True
            return 0
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstd:
    """The content of a Zstandard file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._byte_by_byte = False
        self._open()

    def _open(self) -> None:
        import pyarrow  # Imported here: a slow import that only this kind of file needs.

        self._file.seek(0)
        whole = pyarrow.PythonFile(self._file, mode="r")
        self._stream = pyarrow.CompressedInputStream(whole, "zstd")
        self._read = 0

    def read1(self, size: int) -> bytes:
        try:
            found = bytes(self._stream.read(1 if self._byte_by_byte else size))
        except OSError as error:
            if self._byte_by_byte or isinstance(error, UrlError) or not self._file.seekable():
                raise
            # The failed call has lost what it had decompressed before the damage.
            self._byte_by_byte, done = True, self._read
            self._failed = self._stream  # which would close the file with its own end
            self._open()
            while self._read < done:
                self._read += len(self._stream.read(min(size, done - self._read)))
            return self.read1(size)
        self._read += len(found)
        return found


class _Xz:
    """The content of an xz file, or of the older .lzma, in bounded memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None
        self._rest = b""

    def read1(self, size: int) -> bytes:
        while True:
            if self._decoder is None or self._decoder.eof:
                if self._decoder is not None:
                    self._rest = self._decoder.unused_data
                self._rest = self._rest.lstrip(b"\0") or self._file.read(2**16).lstrip(b"\0")
                if not self._rest:
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)
            elif self._decoder.needs_input:
                self._rest = self._file.read(2**16)
                if not self._rest:
                    raise EOFError
            found = self._decoder.decompress(self._rest, size)
            self._rest = b""
            if found:
                return found


_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": _Zstd,
    ".bz2": bz2.BZ2File,
    ".xz": _Xz,
}
