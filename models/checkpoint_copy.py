"""A checkpoint to be read whole on this machine: where it is, or a copy of one by URL."""

import hashlib
from pathlib import Path

from data.url_cache import fetch_folder
from data.urls import Location, Url, cache_folder
from models.checkpoint_format import MANIFEST, check_listing, find_checkpoint


def local_checkpoint(run: Location, field: str = "run") -> Path:
    """Return the checkpoint that `find_checkpoint` finds; of one by URL, a verified copy.

    The copy is kept in the cache folder under the digest of its manifest, and made once.

    Raises:
        ValueError: If there is none, or it is damaged, or cannot be copied.
    """
    checkpoint = find_checkpoint(run, field)
    if not isinstance(checkpoint, Url):
        return checkpoint
    manifest = check_listing(checkpoint)
    digest = hashlib.sha256(manifest.content()).hexdigest()
    copy = cache_folder() / "checkpoints" / digest[:32] / checkpoint.name
    fetch_folder(
        checkpoint, copy, {name: str(entry["sha256"]) for name, entry in manifest.files.items()}
    )
    if not (copy / MANIFEST).is_file():
        manifest.write(copy)
    return copy
