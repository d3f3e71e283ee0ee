"""Making a dataset out of text, from reading the input to naming the finished folder.

Two passes over the input, see `data.stages`: the first counts, splits and trains the tokenizer, the
second encodes. The dataset appears under its name only when it is complete. Prints nothing, for
training calls it too; `data.prepare` is its command.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.chats import open_template
from data.dataset import DESCRIPTION_NAME, Dataset, open_dataset
from data.pieces.workers import start_workers
from data.row_layout import RowLayout
from data.shards import MAX_VOCAB_SIZE
from data.stages import Preparation
from data.tokenizer import Tokenizer

Stage = Literal["survey", "encode", "merge"]

logger = logging.getLogger(__name__)

_LEAST_TOKENS = 260
"""unk, BOS, EOS, 256 bytes and one character."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What fixes the bytes of a dataset, together with the input itself."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")]
    """Files (.txt .md .html .jsonl .json .csv .tsv .parquet, source code; all but Parquet also in
    .gz .zst .bz2 .xz), folders (recursive, without hidden entries), globs, any of these by URL
    (s3:// gs:// hf:// https://), or the word embedded: the sources of the running Python and of
    torch, about 58 MB that need no download, or
    hf:NAME[:SPLIT[:CONFIG]]: a Hugging Face dataset, a folder that its save_to_disk wrote or a name
    on the hub, streamed twice (split train if not given). JSON, tables and Parquet hold a document
    per row, other files one each."""
    tokenizer: Path | None = None
    """A SentencePiece model, or a Hugging Face tokenizer.json with its tokenizer_config.json beside
    it, which names BOS and EOS; not beside vocab_size."""
    vocab_size: int | None = None
    """Train a SentencePiece BPE model of this many tokens on a sample of 8 MB; not beside
    tokenizer."""
    validation_fraction: float = 0.01
    """Expected fraction of documents to hold out, chosen by a hash of their text; at least one
    document is, of a single document its end. Where they would hold more than twice this share of
    the text, large documents are not held out."""
    layout: Annotated[RowLayout, tyro.conf.arg(name="")] = field(default_factory=RowLayout)
    """Fields or columns that hold the text, a chat, or prompt and response."""
    shard_tokens: int = 50_000_000
    """End a shard with the document that reaches this many tokens."""
    duplicates: Literal["keep", "drop", "near"] = "keep"
    """drop: of documents with the same text, take the first alone; near: also of those that nearly
    have the same, see near_threshold. Needs the extra dedup."""
    near_threshold: float = 0.8
    """Documents are near duplicates if they have about this share of all their five words in a row
    in common, estimated by MinHash."""
    max_skipped_fraction: float = 0.1
    """Refuse the input when more of its documents than this fraction cannot be used. Empty
    documents and files of an unknown kind do not count. Changes no byte of a dataset."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if not all(self.input or ("",)):
            found.append("input: empty, name files or folders")
        if (self.tokenizer is None) == (self.vocab_size is None):
            found.append(
                f"tokenizer is {self.tokenizer} and vocab_size is {self.vocab_size},"
                " give exactly one of them"
            )
        if self.vocab_size is not None and not _LEAST_TOKENS <= self.vocab_size <= MAX_VOCAB_SIZE:
            found.append(f"vocab_size: {self.vocab_size}, give {_LEAST_TOKENS} to {MAX_VOCAB_SIZE}")
        if not 0 < self.validation_fraction < 1:
            found.append(
                f"validation_fraction {self.validation_fraction} is not between 0 and 1, try 0.01"
            )
        found += self.layout.problems()
        if not 0 < self.near_threshold <= 1:
            found.append(f"near_threshold {self.near_threshold} is not in (0, 1], try 0.8")
        if self.duplicates == "near" and importlib.util.find_spec("rensa") is None:
            found.append("duplicates: rensa is not installed, pip install -e .[dedup]")
        if self.shard_tokens < 1:
            found.append(f"shard_tokens {self.shard_tokens} is below 1, give more")
        if not 0 <= self.max_skipped_fraction <= 1:
            found.append(
                f"max_skipped_fraction {self.max_skipped_fraction} is not between 0 and 1, try 0.1"
            )
        return found

    def opened(self) -> "PrepareConfig":
        """Return it with the template of chats, where the input is chats.

        Raises:
            ValueError: there is no such template.
        """
        layout = self.layout
        if not layout.messages or layout.template:
            return self
        tokenizer = Tokenizer(self.tokenizer) if self.tokenizer else None
        template = open_template(tokenizer, layout.chat_template)
        return replace(self, layout=replace(layout, template=template))

    def arguments(self) -> dict[str, object]:
        """Return the arguments for `dataset.json`: the tokenizer by its hash, the rest as given."""
        layout = self.opened().layout
        given: dict[str, object] = {
            "input": list(self.input),
            "tokenizer": self.tokenizer and Tokenizer(self.tokenizer).fingerprint,
            "vocab_size": self.vocab_size,
            "validation_fraction": self.validation_fraction,
            "text_field": layout.text_field,
            "shard_tokens": self.shard_tokens,
        }
        if layout.response:
            given |= {"prompt": layout.prompt, "response": layout.response}
        if layout.template:
            digest = hashlib.sha256(layout.template.source.encode()).hexdigest()
            given |= {"messages": layout.messages, "chat_template": digest}
        if self.duplicates != "keep":
            given["duplicates"] = self.duplicates
        if self.duplicates == "near":
            given["near_threshold"] = self.near_threshold
        return given


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
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} is not one of {tasks} tasks, give 0 to {tasks - 1}")
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
