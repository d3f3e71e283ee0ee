"""Copies of files by URL in a folder of this machine, each made once for all its processes.

Imports `urls` and `progress` alone of ours.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from data.progress import Progress
from data.urls import Url, UrlError

_SPARE_BYTES = 2**26


def fetch_folder(source: Url, target: Path, digests: Mapping[str, str]) -> None:
    """Copy files of a folder by URL to a folder of this machine, those that it lacks.

    Each is written aside, compared with its digest, and renamed, so that a file that is there is
    whole. Other processes of this machine wait, and find it.

    Args:
        source: The folder by URL.
        target: Made if missing.
        digests: {name: sha256 in hex} of the files.

    Raises:
        FileNotFoundError: A file is missing.
        UrlError: One cannot be read, or is damaged.
        ValueError: The folder cannot be written, or there is no space for them.
    """
    if all((target / name).is_file() for name in digests):
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            missing = [name for name in digests if not (target / name).is_file()]
            sizes = {name: (source / name).size() for name in missing}
            _check_space(source, target, sum(sizes.values()))
            with Progress(f"copying {source}", sum(sizes.values())) as progress:
                for name in missing:
                    _fetch(source / name, target / name, digests[name])
                    progress.update(sizes[name])
    except (UrlError, FileNotFoundError):
        raise
    except OSError as error:
        raise ValueError(
            f"{target}: {error.strerror or error}, set SKIPSTONE_CACHE to a folder that can hold "
            f"a copy of {source}"
        ) from error


def _fetch(source: Url, target: Path, digest: str) -> None:
    aside = target.with_name(f"{target.name}.partial")
    try:
        source.download(aside)
        with aside.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if found != digest:
            raise UrlError(f"{source} is damaged, sha256 was {digest}, is {found}, use another")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _check_space(source: Url, target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed + _SPARE_BYTES:
        raise ValueError(
            f"{target}: a copy of {source} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB free, "
            "remove old copies there or set SKIPSTONE_CACHE to a larger disk"
        )
