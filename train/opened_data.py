"""The data of a run: checked against what the run starts from, prepared where missing, opened."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from data.dataset import VALIDATION, verify_shards
from data.tokenizer import Tokenizer
from data.url_dataset import dataset_at
from data.urls import is_url, location
from models.checkpoint_format import checkpoint_steps
from train.checkpoints.start import check_start
from train.checkpoints.tokenizers import check_tokenizer
from train.config.config import TrainConfig
from train.decoding.prompts import Prompt, read_prompts
from train.decoding.speculation import Speculation
from train.loop.corpus import Corpus, open_corpus
from train.loop.data_config import DataConfig
from train.loop.validate import HeldOut
from train.monitoring.interruption import Interruption, StopRequestError
from train.parallel.runtime import Runtime


def open_data(
    config: TrainConfig, runtime: Runtime, interruption: Interruption
) -> tuple[Corpus, HeldOut]:
    """Check what the run starts from, and open the datasets; rank 0 prepares what is missing.

    Raises:
        StopRequestError: On every rank, if one was requested to stop meanwhile.
        ValueError: If a dataset cannot be opened, or is not of the tokens of the weights.
    """
    data, start = config.data, config.checkpoint
    runtime.on_every_rank(lambda: check_start(config.checkpoint_folder, start))
    _until_stopped(partial(_copy, data), runtime, interruption)
    prepared = partial(open_corpus, data, config.model.vocab_size)
    _until_stopped(lambda: prepared() if runtime.is_main else None, runtime, interruption)
    corpus = runtime.main_first(prepared)
    if data.verify_shards:
        rank, ranks = runtime.rank, runtime.world_size
        for dataset in corpus.datasets:
            verify = partial(verify_shards, dataset, part=rank, parts=ranks)
            _until_stopped(verify, runtime, interruption)
    _check_tokenizer(config, corpus, runtime)
    windows = runtime.on_every_rank(lambda: corpus.windows(corpus.datasets[0], VALIDATION, data))
    boundaries = corpus.boundaries(corpus.datasets[0]) if data.mask_documents else None
    return corpus, HeldOut(windows, data.seq_len, boundaries)


def open_speculation(
    config: TrainConfig, corpus: Corpus, held_out: HeldOut, runtime: Runtime
) -> Speculation:
    """Read the prompts that are continued while the model trains.

    Raises:
        ValueError: On rank 0, if the task they are to be of cannot be read.
    """
    settings, dataset = config.speculation, corpus.datasets[0]
    tokenizer = Tokenizer(dataset.tokenizer_path)

    def read() -> list[Prompt]:
        return read_prompts(
            settings,
            held_out.windows,
            corpus.boundaries(dataset),
            tokenizer,
            pairs=dataset.holds_pairs,
            context=config.model.max_seq_len,
        )

    prompts = runtime.on_every_rank(read) if settings.interval_steps else []
    trained = config.model.own_exits or config.early_exit.exits
    return Speculation(settings, config.model, prompts, tokenizer, runtime, trained)


def _copy(config: DataConfig) -> None:
    """Copy the datasets by URL to this machine, which is done once for all its ranks.

    Raises:
        ValueError: If one cannot be copied.
    """
    for each in (config.path, *config.also):
        if is_url(each):
            dataset_at(location(each))


def _until_stopped(
    action: Callable[[], object], runtime: Runtime, interruption: Interruption
) -> None:
    """Run `action`, which may take long, on every rank; a request to stop ends it.

    Raises:
        StopRequestError: On every rank, if any was requested to stop.
    """

    def run() -> None:
        with suppress(StopRequestError), interruption.at_once():
            action()

    runtime.on_every_rank(run)
    if reason := next(filter(None, runtime.gather(interruption.reason)), ""):
        raise StopRequestError(reason)


def _check_tokenizer(config: TrainConfig, corpus: Corpus, runtime: Runtime) -> None:
    """Refuse to start from weights of another tokenizer."""
    settings, dataset = config.checkpoint, corpus.datasets[0]

    def check() -> None:
        if not (runtime.is_main and settings.init_from):
            return
        if not checkpoint_steps(config.checkpoint_folder):
            check_tokenizer(
                settings.init_from, dataset.tokenizer_path, dataset.tokenizer_fingerprint
            )

    if not settings.allow_other_tokenizer:
        runtime.on_every_rank(check)
