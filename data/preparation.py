"""Making a dataset out of text, from reading the input to naming the finished folder.

Two passes over the input, see `data.stages`: the first counts, splits and trains the tokenizer, the
second encodes. The dataset appears under its name only when it is complete. Prints nothing, for
training calls it too; `data.prepare` is its command.
"""

import logging
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from data.dataset import DESCRIPTION_NAME, Dataset, open_dataset, write_description
from data.pieces.workers import start_workers
from data.prepare_config import PrepareConfig
from data.stages import Preparation
from data.token_ids.preparation import describe_tokens
from data.tokenizer import Tokenizer

Stage = Literal["survey", "encode", "merge"]

logger = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig, output: Path, *, workers: int | None = None, overwrite: bool = False
) -> Dataset:
    """Make the dataset of `config` in the folder `output`, or open it if it is already there.

    The bytes written depend on the config and the input alone, not on `workers`. Worker processes
    are spawned: a script that calls this needs an `if __name__ == "__main__"` guard.

    Args:
        config: the input, the tokenizer and the splits.
        output: the folder of the dataset; the work happens in a hidden folder beside it.
        workers: processes that encode; None means every core this process may use.
        overwrite: replace a dataset that is already at `output`.

    Raises:
        ValueError: the input or the output cannot be used.
    """
    config, workers, arguments = _checked(config, workers)
    if not _is_free(output) and not overwrite:
        return _open_existing(arguments, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        if config.reads_tokens:
            write_description(_describe_tokens(config, arguments, aside))
        else:
            with start_workers(workers) as started:
                preparation = Preparation(config, arguments, aside, started)
                surveyed = preparation.survey()
                preparation.encode(surveyed)
                preparation.merge(surveyed)
        _name(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return open_dataset(output)


def prepare_stage(
    config: PrepareConfig,
    output: Path,
    stage: Stage,
    *,
    task: int = 0,
    tasks: int = 1,
    workers: int | None = None,
    overwrite: bool = False,
) -> Dataset | None:
    """Do one stage of what `prepare` does, and leave its work for the next; it may be repeated.

    Args:
        config: the same for every stage.
        output: likewise; the work lies in a hidden folder beside it, which all tasks see.
        stage: survey, then encode as so many tasks, in any order or at once, then merge.
        task: which one of the tasks encodes, from 0.
        tasks: their number.
        workers: processes; None means every core this process may use.
        overwrite: replace a dataset that is already at `output`.

    Returns:
        The dataset, if it is there.

    Raises:
        ValueError: the input or the output cannot be used, or an earlier stage is not complete.
    """
    config, workers, arguments = _checked(config, workers)
    _check_stage(config, stage, task, tasks)
    if not _is_free(output) and not overwrite:
        return _open_existing(arguments, output)
    folder = output.parent / f".{output.name}.partial-tasks"
    if stage == "survey":
        folder.mkdir(parents=True, exist_ok=True)
    with start_workers(workers) as started:
        preparation = Preparation(config, arguments, folder, started)
        if stage == "survey":
            preparation.survey()
        else:
            surveyed = preparation.surveyed()
            if stage == "encode":
                preparation.encode(surveyed, task=task, tasks=tasks)
            else:
                preparation.check_encoded(surveyed, tasks)
                preparation.merge(surveyed)
    if stage != "merge":
        return None
    _name(folder, output)
    return open_dataset(output)


def _checked(
    config: PrepareConfig, workers: int | None
) -> tuple[PrepareConfig, int, dict[str, object]]:
    """Return the config with its template, the number of processes, and what `dataset.json` has."""
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    if workers is None:
        workers = _available_cores()
    if workers < 1:
        raise ValueError(f"workers {workers} is below 1, give at least 1")
    config = config.opened()
    # Loads the tokenizer, whose faults are raised first.
    return config, workers, config.arguments()


def _check_stage(config: PrepareConfig, stage: Stage, task: int, tasks: int) -> None:
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} is not one of {tasks} tasks, give 0 to {tasks - 1}")
    if config.reads_tokens:
        raise ValueError(f"stage {stage}: nothing is encoded of token ids, leave it out")


def _describe_tokens(
    config: PrepareConfig, arguments: Mapping[str, object], folder: Path
) -> Dataset:
    assert config.tokenizer is not None
    return describe_tokens(
        config.input,
        config.tokens,
        Tokenizer(config.tokenizer),
        folder,
        arguments=arguments,
        validation_fraction=config.validation_fraction,
        shard_tokens=config.shard_tokens,
    )


def _name(folder: Path, output: Path) -> None:
    """Give a folder that is complete its name."""
    if output.exists():
        shutil.rmtree(output)
    folder.rename(output)


def _available_cores() -> int:
    """Return the number of cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_free(output: Path) -> bool:
    """Whether `output` is free; anything there but a dataset is refused, not replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return True
    if not (output / DESCRIPTION_NAME).is_file():
        raise ValueError(f"output {output} exists and is no dataset, give another --output")
    return False


def _open_existing(arguments: Mapping[str, object], output: Path) -> Dataset:
    """Open the dataset at `output`, if it was made with the same arguments."""
    dataset = open_dataset(output)
    if dataset.arguments != arguments:
        raise ValueError(
            f"output {output} holds a dataset made with other arguments, give another --output"
            " or --overwrite"
        )
    logger.info("%s is already there, made with the same arguments", output)
    return dataset
