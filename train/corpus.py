"""The training data: where the shards are, and the batches they are dealt out in."""

import logging
from dataclasses import dataclass
from pathlib import Path

from data.dataset import TRAIN, VALIDATION, Dataset, open_dataset
from data.loader import TokenLoader
from data.preparation import PrepareConfig, prepare
from data.shards import TokenStream
from train.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how much of it in one step."""

    path: str
    """Folder of token shards, made by `python -m data.prepare`."""
    input: tuple[str, ...] = ()
    """Text to prepare `path` from if it does not exist yet: paths, or "embedded" for the corpus
    every machine has. Empty: `path` must exist."""
    seq_len: int = 2048
    """Tokens per sequence."""
    global_batch_size: int = 256
    """Sequences per optimizer step, over all ranks."""
    microbatch_size: int = 0
    """Sequences per rank and forward pass; global_batch_size / (ranks * microbatch_size) of them
    accumulate to one step. 0: a rank's whole share at once, without accumulation."""
    verify_shards: bool = True
    """Before step 1, read all shards, each rank its part, and compare them with the checksums of
    their preparation. False: only their sizes."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.global_batch_size * self.seq_len

    def rows_at_once(self, world_size: int) -> int:
        """Return the sequences of one microbatch on one of `world_size` ranks."""
        return self.microbatch_size or self.global_batch_size // world_size

    def problems(self, world_size: int) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = [
            f"data.{name}: {getattr(self, name)}, must be at least {least}"
            for name, least in (("seq_len", 1), ("global_batch_size", 1), ("microbatch_size", 0))
            if getattr(self, name) < least
        ]
        if not found and self.global_batch_size % (world_size * max(self.microbatch_size, 1)):
            rows = f" * data.microbatch_size {self.microbatch_size}" if self.microbatch_size else ""
            found.append(
                f"data.global_batch_size: {self.global_batch_size} is not a multiple of "
                f"{world_size} ranks{rows}, change one of them"
            )
        return found


def open_corpus(config: DataConfig, vocab_size: int) -> Dataset:
    """Open the prepared dataset, preparing it first if it is missing and `input` says from what.

    Raises:
        ValueError: If it cannot be opened, or its ids do not fit the model.
    """
    path = Path(config.path)
    if config.input and not path.exists():
        logger.info("preparing %s from %s", path, ", ".join(config.input))
        prepare(PrepareConfig(input=config.input, vocab_size=vocab_size), path)
    dataset = open_dataset(path)
    if dataset.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size: {vocab_size} is smaller than the {dataset.vocab_size} ids of "
            f"{path}, raise it or prepare the data with that size"
        )
    return dataset


def train_loader(dataset: Dataset, config: DataConfig, runtime: Runtime, seed: int) -> TokenLoader:
    """Return this rank's share of the shuffled training windows."""
    loader = TokenLoader(
        dataset.stream(TRAIN),
        seq_len=config.seq_len,
        global_batch_size=config.global_batch_size,
        microbatch_size=config.rows_at_once(runtime.world_size),
        seed=seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    logger.info(
        "data: %s windows of %d tokens per epoch, %d tokens at the end of the stream left out",
        f"{loader.windows:,}",
        config.seq_len,
        loader.dropped_tokens,
    )
    if loader.windows < config.global_batch_size:
        logger.warning(
            "data.global_batch_size: %d is more than the %d windows of %s, every step repeats some",
            config.global_batch_size,
            loader.windows,
            config.path,
        )
    return loader


def validation_stream(dataset: Dataset, config: DataConfig) -> TokenStream:
    """Return the held-out tokens.

    Raises:
        ValueError: If they are fewer than one sequence.
    """
    stream = dataset.stream(VALIDATION)
    if len(stream) <= config.seq_len:
        raise ValueError(
            f"data.seq_len: {config.seq_len} needs {config.seq_len + 1} tokens but the validation "
            f"split of {config.path} has {len(stream)}, shorten it or hold out more"
        )
    return stream
