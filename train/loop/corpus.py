"""The training data of a run: its datasets and the loader of its batches."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from data.boundaries import Boundaries, Marks
from data.dataset import TRAIN, Dataset
from data.loader import TokenLoader
from data.mixture import PERIOD, Mixture
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.reading import Reading, Source, begin, open_mixture
from data.responses import measure_responses
from data.tokenizer import Tokenizer
from data.url_dataset import dataset_at
from data.urls import location
from data.windows import Packing, Windows, open_windows
from train.loop.data_config import DataConfig
from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)

_MARKED: dict[Marks, str] = {
    "both": "BOS begins and EOS ends",
    "first": "BOS begins",
    "last": "EOS ends",
}

PREPARED = Path("outputs/data")
"""Folder of the datasets that runs prepare for themselves."""


@dataclass(frozen=True)
class Corpus:
    """The datasets of a run, of one tokenizer; validation reads the first."""

    datasets: tuple[Dataset, ...]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the tokens of all datasets."""
        prints = [dataset.fingerprint for dataset in self.datasets]
        if len(prints) == 1:
            return prints[0]
        return hashlib.sha256("".join(prints).encode()).hexdigest()

    @cached_property
    def _ends(self) -> tuple[int, int]:
        tokenizer = Tokenizer(self.datasets[0].tokenizer_path)
        return tokenizer.bos_id, tokenizer.eos_id

    def boundaries(self, dataset: Dataset) -> Boundaries:
        """Return where the documents of a dataset begin."""
        return Boundaries(*self._ends, dataset.marks)

    def windows(self, dataset: Dataset, split: str, config: DataConfig) -> Windows:
        """Return the sequences of one split.

        Raises:
            ValueError: If there is none.
        """
        return self._open(dataset, split, config.packing, config.seq_len)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets as sources of training rows."""
        return tuple(
            Source(str(dataset.path), dataset.fingerprint, partial(self._open, dataset, TRAIN))
            for dataset in self.datasets
        )

    def unread(self, config: DataConfig) -> Reading:
        """Return the mixture of the sources of which nothing is read.

        Raises:
            ValueError: If one has no sequence.
        """
        return begin(self.sources, config.weights, config.packing, config.seq_len)

    def _open(self, dataset: Dataset, split: str, packing: Packing, seq_len: int) -> Windows:
        stream = dataset.stream(split)
        try:
            boundaries = self.boundaries(dataset)
            return open_windows(stream, packing, seq_len=seq_len, boundaries=boundaries)
        except ValueError as error:
            raise ValueError(f"data: {split} of {dataset.path}: {error}") from error

    def check_responses(self, dataset: Dataset, split: str, config: DataConfig) -> None:
        """Log how many pairs lose their response or a part of it, where documents are whole.

        Raises:
            ValueError: If all lose it.
        """
        if not dataset.holds_pairs or config.packing != "documents":
            return
        found = measure_responses(dataset.stream(split), self.boundaries(dataset), config.seq_len)
        whose = f"of the {found.pairs} pairs in {split} of {dataset.path}"
        if found.lost == found.pairs:
            raise ValueError(
                f"data.seq_len: {config.seq_len} holds no token of a response {whose}, "
                f"{found.longest} holds all"
            )
        if found.lost or found.cut:
            logger.warning(
                "data.seq_len: %d leaves out the response of %d %s, and the end of %d more; "
                "%d keeps all",
                config.seq_len,
                found.lost,
                whose,
                found.cut,
                found.longest,
            )


def prepared_path(texts: Sequence[str], vocab_size: int) -> Path | None:
    """Return the one path at which a run itself prepares these texts; None without any."""
    if not texts:
        return None
    name = "embedded"
    if tuple(texts) != (name,):
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
        name = f"{re.sub('[^A-Za-z0-9_-]', '', Path(texts[0]).stem)[:40] or 'text'}-{digest}"
    return PREPARED / f"{name}-{vocab_size}"


def open_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """Open the prepared datasets; prepare that of `input`, at its own path, if it is missing.

    Raises:
        ValueError: If one cannot be opened, or its ids do not fit the model or the others.
    """
    path = Path(config.path)
    if path == prepared_path(config.input, vocab_size) and not path.exists():
        logger.info(
            "data.path: not given, preparing %s from %s, with a tokenizer of %d ids",
            path,
            ", ".join(config.input),
            vocab_size,
        )
        prepare(PrepareConfig(input=config.input, vocab_size=vocab_size), path)
    first, *others = datasets = [dataset_at(location(each)) for each in (config.path, *config.also)]
    if first.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size: {vocab_size} is smaller than the {first.vocab_size} ids of "
            f"{path}, raise it or prepare the data with that size"
        )
    if first.vocab_size < vocab_size:
        logger.info(
            "model.vocab_size: %d, of which %s has %d: the others are never learnt",
            vocab_size,
            path,
            first.vocab_size,
        )
    for other in others:
        if other.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise ValueError(
                f"data.also: {other.path} was made with another tokenizer than {path}, prepare it "
                f"again with --tokenizer {first.tokenizer_path}"
            )
        if config.mask_documents and other.marks != first.marks:
            raise ValueError(
                f"data.also: in {other.path} {_MARKED[other.marks]} every document, in {path} "
                f"{_MARKED[first.marks]}, give --data.mask_documents False or one kind alone"
            )
    return Corpus(tuple(datasets))


def train_loader(
    corpus: Corpus,
    config: DataConfig,
    runtime: Runtime,
    seed: int,
    *,
    reading: Reading,
    next_row: int = 0,
    rows: int,
) -> TokenLoader:
    """Return the loader of this rank's training rows; log how much of each source is read.

    Args:
        corpus: The datasets.
        config: Sizes of batches.
        runtime: This rank.
        seed: Of the order.
        reading: How far the sources were read before.
        next_row: The row that is read next.
        rows: Rows from there to the end.

    Raises:
        ValueError: If a source has no row, or, on rank 0, no response within seq_len.
    """
    for dataset in corpus.datasets if runtime.is_main else ():
        corpus.check_responses(dataset, TRAIN, config)
    mixture = open_mixture(reading, corpus.sources, seed=seed)
    _log_what_is_read(corpus, config, mixture, next_row, rows)
    return TokenLoader(
        mixture,
        global_batch_size=config.global_batch_size,
        microbatch_size=config.microbatch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        boundaries=corpus.boundaries(corpus.datasets[0]) if config.mask_documents else None,
    )


def _log_what_is_read(
    corpus: Corpus, config: DataConfig, mixture: Mixture, next_row: int, rows: int
) -> None:
    tokens = rows * config.seq_len
    epochs = mixture.epochs(next_row + rows)
    for i, (dataset, source) in enumerate(zip(corpus.datasets, mixture.sources, strict=True)):
        share = mixture.rows_per_period[i] / PERIOD
        logger.info(
            "data: %s tokens of %s, %.1f %% of all: %.2f epochs of %s windows of %d, %d left out",
            f"{round(tokens * share):,}",
            dataset.path,
            share * 100,
            epochs[i],
            f"{len(source):,}",
            config.seq_len,
            source.dropped_tokens,
        )
    if mixture.windows < config.global_batch_size:
        logger.warning(
            "data.global_batch_size: %d is more than the %d windows of %s, every step repeats some",
            config.global_batch_size,
            mixture.windows,
            config.path,
        )
