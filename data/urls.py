"""Files and folders by URL, such as `s3://bucket/corpus`: read, listed, written through fsspec.

A path of this machine stays a `pathlib.Path`, which `location` returns for everything else: nothing
local goes through fsspec. Whatever an object store or its client raises is a `UrlError`, one line
that names the URL and the remedy. Every room may import this file, which imports none of ours.
"""

import asyncio
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# What fsspec needs for a scheme, and what of ours installs it.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "gs": "run gcloud auth application-default login or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "set HF_TOKEN or run hf auth login",
}
_ENDPOINTS = {
    "s3": "the network and AWS_ENDPOINT_URL",
    "gs": "the network and STORAGE_EMULATOR_HOST",
}
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_CLIENTS = ("aiobotocore", "botocore", "s3fs", "gcsfs")
_BLOCK_BYTES = 2**24


class UrlError(OSError, ValueError):
    """A URL that cannot be read or written: one line with the URL, the reason and the remedy."""


class MissingUrlError(UrlError, FileNotFoundError):
    """A URL at which there is nothing."""


class UnreachableError(UrlError):
    """A URL whose server is away, which may pass."""


@dataclass(frozen=True, order=True)
class Url:
    """A file or folder of an object store or server, used as a `Path` is.

    Every method raises a `UrlError`, for what is not there a `MissingUrlError`.
    """

    text: str
    """Without a slash at its end."""

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    @property
    def scheme(self) -> str:
        """What stands before `://`, such as `s3`."""
        return self.text.partition("://")[0].lower()

    @property
    def lists(self) -> bool:
        """Whether its server lists folders; one of the web does not, or guesses."""
        return self.scheme not in ("http", "https")

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """The folder it lies in."""
        return Url(self.text.rpartition("/")[0])

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the file to be read, or to be written whole ("wb"): it is there once closed.

        What the returned file raises itself is to be met in `explained`.
        """
        with explained(self):
            file: IO[bytes] = _connect(self).open(self.text, mode, block_size=_BLOCK_BYTES)
            return file

    def read_bytes(self, limit: int = -1) -> bytes:
        """Return the content of the file, at most `limit` bytes of it."""
        with explained(self), self.open() as file:
            return file.read(limit)

    def write_bytes(self, content: bytes) -> None:
        """Write the file: whole or not at all."""
        with explained(self):
            _connect(self).pipe_file(self.text, content)

    def size(self) -> int:
        """Return the bytes of the file."""
        with explained(self):
            size = _connect(self).size(self.text)
        if size is None:
            raise UrlError(f"{self}: its server does not tell its size, copy it to a folder")
        return int(size)

    def is_file(self) -> bool:
        """Whether there is such a file."""
        with explained(self):
            try:  # fsspec's own isfile takes any error for an absence
                return bool(_connect(self).info(self.text)["type"] == "file")
            except FileNotFoundError:
                return False

    def files(self) -> dict[str, int]:
        """Return {name: bytes} of the files in the folder itself; empty where there is none."""
        return {
            _last_part(entry): int(entry.get("size") or 0)
            for entry in self._list()
            if entry["type"] == "file" and _last_part(entry)  # a marker of the folder has no name
        }

    def folders(self) -> list[str]:
        """Return the names of the folders in the folder, sorted; empty where there are none."""
        return sorted(_last_part(entry) for entry in self._list() if entry["type"] == "directory")

    def download(self, target: Path) -> None:
        """Copy the file to a path of this machine."""
        with explained(self):
            _connect(self).get_file(self.text, str(target))

    def upload(self, source: Path) -> None:
        """Write the file with the content of one of this machine."""
        with explained(self):
            _connect(self).put_file(str(source), self.text)

    def copy_to(self, target: "Url") -> None:
        """Copy the file within its store."""
        with explained(self):
            _connect(self).cp_file(self.text, target.text)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        with explained(self):
            try:
                _connect(self).rm_file(self.text)
            except FileNotFoundError:
                return

    def remove_folder(self) -> None:
        """Remove the folder and all in it, if there is one."""
        with explained(self):
            try:
                _connect(self).rm(self.text, recursive=True)
            except FileNotFoundError:
                return

    def _list(self) -> list[dict[str, Any]]:
        with explained(self):
            try:
                entries: list[dict[str, Any]] = _connect(self).ls(self.text, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        own = _connect(self)._strip_protocol(self.text).rstrip("/")
        return [entry for entry in entries if entry["name"].rstrip("/") != own]


Location = Path | Url
"""A file or folder of this machine, or one by URL."""


def is_url(text: object) -> bool:
    """Whether this is a URL of a scheme fsspec may read, and no path; `file://` is a path."""
    found = _SCHEME.match(str(text))
    return bool(found) and found[1].lower() != "file"  # type: ignore[index]


def location(text: str) -> Location:
    """Return the `Url` or the `Path` that a text is: `Path` alone would take a slash of `s3://`.

    Raises:
        ValueError: It is a URL without anything behind the scheme.
    """
    if is_url(text):
        url = Url(text.strip().rstrip("/"))
        if "://" not in url.text:
            raise ValueError(f"{text} names no bucket or host, give one: {url.text}//NAME")
        return url
    if text[:7].lower() == "file://":
        return Path(unquote(urlsplit(text).path))
    return Path(text)


def cache_folder() -> Path:
    """Return the folder of local copies: $SKIPSTONE_CACHE, else ~/.cache/skipstone."""
    return Path(os.environ.get("SKIPSTONE_CACHE") or Path.home() / ".cache" / "skipstone")


@contextmanager
def explained(url: Url) -> Iterator[None]:
    """Turn whatever a store or its client raises into one line.

    Raises:
        MissingUrlError: There is no such file or bucket.
        UnreachableError: Its server is away.
        UrlError: Anything else.
    """
    try:
        yield
    except UrlError:
        raise
    except FileNotFoundError as error:
        if _is_unreachable(error):  # which fsspec's file system of the web does not tell apart
            raise UnreachableError(f"{url}: {_reason(url, error)}") from None
        raise MissingUrlError(f"{url} does not exist, check bucket and name") from None
    except Exception as error:  # clients raise anything: botocore's, aiohttp's, Google's
        kind = UnreachableError if _is_unreachable(error) else UrlError
        raise kind(f"{url}: {_reason(url, error)}") from None


def _connect(url: Url) -> Any:
    """Return fsspec's file system of a URL, without what it remembers of listings.

    Other processes write there too.
    """
    from fsspec.core import url_to_fs

    for client in _CLIENTS:  # which log at INFO where they found the credentials
        logging.getLogger(client).setLevel(logging.WARNING)
    system = url_to_fs(url.text, **(_s3_options() if url.scheme in ("s3", "s3a") else {}))[0]
    system.invalidate_cache()
    return system


@cache
def _s3_options() -> dict[str, Any]:
    """Return what bounds the time that a server may take that does not answer."""
    try:
        from aiobotocore.session import get_session
        from botocore.handlers import add_expect_header
    except ImportError:  # explained where s3fs is imported
        return {}
    session = get_session()
    # Its answer is waited for without a limit.
    session.unregister("before-call.s3", add_expect_header)
    # s3fs tries five times by itself, and botocore as often in each.
    return {
        "session": session,
        "config_kwargs": {"read_timeout": 20, "retries": {"max_attempts": 1}},
    }


def _last_part(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _reason(url: Url, error: Exception) -> str:
    """Return why, and the remedy."""
    scheme = _ALIASES.get(url.scheme, url.scheme)
    credentials = _CREDENTIALS.get(scheme, "check the credentials")
    endpoint = _ENDPOINTS.get(scheme, "the network and the address")
    causes = [error, *_causes(error)]
    names = " ".join(type(cause).__name__ for cause in causes)
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ImportError):
        package = _PACKAGES.get(url.scheme, "its package")
        extra = " (pip install 'skipstone[s3]')" if package == "s3fs" else ""
        return f"{package} is not installed, run pip install {package}{extra}"
    if isinstance(error, ValueError) and "rotocol not known" in text:
        return f"fsspec has no scheme {url.scheme}, give a folder, s3://, gs://, hf:// or https://"
    if "Credential" in names or "Token" in names:
        return f"no credentials ({text}), {credentials}"
    if any(isinstance(cause, PermissionError) for cause in causes):
        return f"access denied ({text}), check the permissions, and {credentials}"
    if _is_unreachable(error):
        return f"cannot be reached ({text}), check {endpoint}"
    return f"{text}, check the URL and {endpoint}"


def _is_unreachable(error: Exception) -> bool:
    unreachable = (ConnectionError, TimeoutError, asyncio.TimeoutError)
    return any(
        isinstance(cause, unreachable) or re.search("Connect|Timeout|DNS", type(cause).__name__)
        for cause in (error, *_causes(error))
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    for _ in range(8):
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        yield cause
        error = cause
