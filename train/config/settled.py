"""What a configuration leaves to the data: the path of the dataset, and the model's vocabulary.

Reads the description of a dataset or a checkpoint, and writes nothing; every rank comes to the
same.
"""

import logging
from dataclasses import replace
from pathlib import Path

from data.dataset import Dataset
from data.url_dataset import dataset_at
from data.urls import is_url, location
from models.checkpoint_format import checkpoint_steps, find_checkpoint, read_manifest
from train.config.command_line import Command
from train.config.config import TrainConfig
from train.loop.corpus import prepared_path
from train.loop.data_config import DataConfig

logger = logging.getLogger(__name__)


def settle(command: Command) -> TrainConfig:
    """Return the configuration with its dataset's path and its vocabulary.

    A dry run needs neither dataset nor checkpoint; without them the vocabulary stays the preset's.

    Raises:
        ValueError: If no dataset is named, or there is none where one is named.
    """
    config, given = command.config, command.given
    least = config.data.vocab_multiple
    if "model.vocab_size" in given or least < 1:
        vocab_size = config.model.vocab_size
    else:
        vocab_size = -(-config.model.vocab_size // least) * least
    data = _settle_path(config.data, given, vocab_size)
    config = replace(config, data=data, model=replace(config.model, vocab_size=vocab_size))
    own = data.path == str(prepared_path(data.input, vocab_size))
    try:
        datasets = [_open(path, "data.also") for path in data.also]
        datasets += [] if own else [_open(data.path, "data.path")]
        if own or "model.vocab_size" in given:
            return config
        vocab_size, whose = _vocabulary(config, datasets[-1])
    except ValueError as error:
        if command.dry_run is None:
            raise
        logger.info("plan: with model.vocab_size %d, for %s", vocab_size, error)
        return config
    if vocab_size != config.model.vocab_size:
        logger.info("model.vocab_size: %d, that of %s", vocab_size, whose)
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def _open(path: str, field: str) -> Dataset:
    try:
        return dataset_at(location(path), shards=False)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _settle_path(data: DataConfig, given: frozenset[str], vocab_size: int) -> DataConfig:
    """Return the data with one path: the user's, or that of what the run prepares itself."""
    if "data.input" in given and data.input and "data.path" not in given:
        data = replace(data, path="")
    elif "data.path" in given and not data.path:
        raise ValueError("data.path: empty, name a dataset or leave it out")
    own = prepared_path(data.input, vocab_size)
    if not data.path:
        if own is None:
            raise ValueError("data.path: none, give --data.path DATASET or --data.input TEXT")
        return replace(data, path=str(own))
    if own is None or Path(data.path) == own:
        return data
    if "data.input" in given and not (is_url(data.path) or Path(data.path).exists()):
        texts = " ".join(data.input)
        raise ValueError(
            f"data.path: {data.path} does not exist, and nothing is prepared at a path that is "
            "given, leave it out, or prepare it: python -m data.prepare "
            f"--input {texts} --output {data.path} --vocab_size {vocab_size}"
        )
    return replace(data, input=())


def _vocabulary(config: TrainConfig, dataset: Dataset) -> tuple[int, str]:
    """Return the vocabulary of the weights a run starts from, else of its dataset, and whose."""
    start = config.checkpoint.starts_from
    if own := checkpoint_steps(config.checkpoint_folder):
        path = own[max(own)]
    elif start:
        field = "resume_from" if config.checkpoint.resume_from else "init_from"
        path = find_checkpoint(location(start), f"checkpoint.{field}")
    else:
        multiple = config.data.vocab_multiple
        return -(-dataset.vocab_size // multiple) * multiple, str(dataset.path)
    return read_manifest(path).model.vocab_size, str(path)
