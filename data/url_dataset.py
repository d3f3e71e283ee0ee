"""A dataset by URL: copied to this machine to be read, and from it when it is made."""

import logging
import shutil
import uuid
from pathlib import Path

from data.chats import TEMPLATE_NAME
from data.dataset import DESCRIPTION_NAME, TOKENIZER_NAME, Dataset, open_dataset, read_description
from data.foreign_json import MAX_BYTES
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.progress import Progress
from data.url_cache import fetch_folder
from data.urls import Location, Url, cache_folder

_PROBE = ".probe"
logger = logging.getLogger(__name__)


def dataset_at(source: Location, *, shards: bool = True) -> Dataset:
    """Open a dataset; of one by URL a copy, made once for all processes of this machine.

    The copy lies in the cache folder under the fingerprint of the dataset.

    Args:
        source: Its folder.
        shards: Whether its tokens are to be read; without, a copy has its tokenizer alone.

    Raises:
        ValueError: It is no dataset, is damaged, or cannot be copied.
    """
    if not isinstance(source, Url):
        return open_dataset(source)
    try:
        content = (source / DESCRIPTION_NAME).read_bytes(MAX_BYTES + 1)
        dataset = read_description(content, Path(), source)
        copy = cache_folder() / "datasets" / dataset.fingerprint[:32]
        digests = {TOKENIZER_NAME: dataset.tokenizer_fingerprint}
        if shards:
            digests |= {s.name: s.sha256 for split in dataset.splits.values() for s in split.shards}
        fetch_folder(source, copy, digests)
        if (source / TEMPLATE_NAME).is_file():
            _write(copy / TEMPLATE_NAME, (source / TEMPLATE_NAME).read_bytes(MAX_BYTES))
    except FileNotFoundError as error:
        raise ValueError(
            f"dataset {error}, make one with python -m data.prepare --input ... --output {source}"
        ) from None
    _write(copy / DESCRIPTION_NAME, content)
    return open_dataset(copy)


def _write(path: Path, content: bytes) -> None:
    """Write a file if it is not there like this: other processes may be reading it."""
    if path.is_file() and path.read_bytes() == content:
        return
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    aside.write_bytes(content)
    aside.replace(path)


def prepare_at(
    config: PrepareConfig, output: Location, *, workers: int | None = None, overwrite: bool = False
) -> Dataset:
    """Prepare a dataset, see `prepare`; for a URL on this machine first, then copied there.

    `dataset.json` is written last: without it there is no dataset.

    Raises:
        ValueError: The input or the output cannot be used.
    """
    if not isinstance(output, Url):
        return prepare(config, output, workers=workers, overwrite=overwrite)
    if (output / DESCRIPTION_NAME).is_file() and not overwrite:
        there = dataset_at(output, shards=False)
        if there.arguments != config.arguments():
            raise ValueError(
                f"output {output} holds a dataset made with other arguments, give another --output"
                " or --overwrite"
            )
        logger.info("%s is already there, made with the same arguments", output)
        return there
    if not overwrite and output.files():
        raise ValueError(f"output {output} exists and is no dataset, give another --output")
    (output / _PROBE).write_bytes(b"")  # what may not be written is not worth preparing
    (output / _PROBE).remove()
    folder = cache_folder() / f"prepared-{uuid.uuid4().hex[:8]}"
    try:
        dataset = prepare(config, folder, workers=workers)
        if any(shard.elsewhere for split in dataset.splits.values() for shard in split.shards):
            raise ValueError(
                f"output {output}: token files are read where they are, on this machine, give a "
                "folder of it"
            )
        _upload(dataset, output)
        return dataset_at(output, shards=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _upload(dataset: Dataset, output: Url) -> None:
    shards = [shard.name for split in dataset.splits.values() for shard in split.shards]
    names = (*shards, TOKENIZER_NAME, TEMPLATE_NAME, DESCRIPTION_NAME)
    paths = [path for name in names if (path := dataset.path / name).is_file()]
    (output / DESCRIPTION_NAME).remove()
    with Progress(f"copying to {output}", sum(path.stat().st_size for path in paths)) as progress:
        for path in paths:
            (output / path.name).upload(path)
            progress.update(path.stat().st_size)
    for name in output.files().keys() - {path.name for path in paths}:  # of the one replaced
        if name.endswith(".tokens"):
            (output / name).remove()
