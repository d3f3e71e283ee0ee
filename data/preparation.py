"""Making a dataset out of text, from reading the input to naming the finished folder.

Two passes over the input: the first counts, splits and trains the tokenizer, the second encodes.
The dataset appears under its name only when it is complete. Prints nothing, for training calls it
too; `data.prepare` is its command.
"""

import hashlib
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.dataset import (
    DESCRIPTION_NAME,
    TOKENIZER_NAME,
    TRAIN,
    VALIDATION,
    Dataset,
    Split,
    open_dataset,
    write_description,
)
from data.encoding import encode_documents
from data.faults import Faults
from data.progress import Progress
from data.row_layout import Document, RowLayout
from data.shards import MAX_VOCAB_SIZE, ShardWriter
from data.sources.documents import read_documents
from data.survey import Survey, document_digest, survey_documents
from data.token_ids.preparation import describe_tokens, holds_tokens
from data.token_ids.splitting import TokenOptions
from data.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_SAMPLE_BYTES = 8_000_000
_LEAST_TOKENS = 260
"""unk, BOS, EOS, 256 bytes and one character."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What fixes the bytes of a dataset, together with the input itself."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")]
    """Files (.txt .jsonl .jsonl.gz .parquet and source code), folders (recursive, without hidden
    entries), globs, or the word embedded: the sources of the running Python and of torch, about
    58 MB that need no download, or hf:NAME[:SPLIT[:CONFIG]]: a Hugging Face dataset, a folder that
    its save_to_disk wrote or a name on the hub, streamed twice (split train if not given). JSON
    lines and Parquet hold a document per row, other files one each. Or token files (.bin .npy
    .tokens) and rows of token ids, see tokens_field."""
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
    tokens: Annotated[TokenOptions, tyro.conf.arg(name="")] = field(default_factory=TokenOptions)
    """Inputs that hold token ids in place of text."""
    layout: Annotated[RowLayout, tyro.conf.arg(name="")] = field(default_factory=RowLayout)
    """JSON fields or Parquet columns that hold the text, or prompt and response."""
    shard_tokens: int = 50_000_000
    """End a shard with the document that reaches this many tokens; a shard is held in memory until
    it is written, 2 or 4 bytes per token."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: of documents with the same text, take the first alone."""
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
        found += self._token_problems()
        if not 0 < self.validation_fraction < 1:
            found.append(
                f"validation_fraction {self.validation_fraction} is not between 0 and 1, try 0.01"
            )
        found += self.layout.problems()
        if self.shard_tokens < 1:
            found.append(f"shard_tokens {self.shard_tokens} is below 1, give more")
        if not 0 <= self.max_skipped_fraction <= 1:
            found.append(
                f"max_skipped_fraction {self.max_skipped_fraction} is not between 0 and 1, try 0.1"
            )
        return found

    def _token_problems(self) -> list[str]:
        if not self.reads_tokens:
            given = self.tokens.given()
            return [f"{name}: for token files alone, but the input is text" for name in given]
        found = []
        if self.vocab_size is not None:
            found.append("vocab_size trains a tokenizer on text, of token ids name the tokenizer")
        if self.tokens.tokens_field and self.tokens.validation_input:
            found.append("validation_input: for token files alone, but tokens_field names rows")
        if self.layout.response or self.duplicates == "drop":
            found.append("response and duplicates are for text, but the input is token ids")
        return found

    @property
    def reads_tokens(self) -> bool:
        """Whether the input holds token ids.

        Raises:
            ValueError: some of it does.
        """
        return holds_tokens(self.input, self.tokens)

    def arguments(self) -> dict[str, object]:
        """Return the arguments for `dataset.json`: the tokenizer by its hash, the rest as given."""
        layout = self.layout
        given: dict[str, object] = {
            "input": list(self.input),
            "tokenizer": self.tokenizer and Tokenizer(self.tokenizer).fingerprint,
            "vocab_size": self.vocab_size,
            "validation_fraction": self.validation_fraction,
            "text_field": layout.text_field,
            "shard_tokens": self.shard_tokens,
        }
        given |= self.tokens.given()
        if layout.response:
            given |= {"prompt": layout.prompt, "response": layout.response}
        if self.duplicates == "drop":
            given["duplicates"] = self.duplicates
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
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    if workers is None:
        workers = _available_cores()
    if workers < 1:
        raise ValueError(f"workers {workers} is below 1, give at least 1")
    arguments = config.arguments()  # Loads the tokenizer, whose faults are raised first.
    if not _is_free(output) and not overwrite:
        return _open_existing(arguments, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        write_description(_fill(config, arguments, aside, workers))
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return open_dataset(output)


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


def _fill(
    config: PrepareConfig, arguments: Mapping[str, object], folder: Path, workers: int
) -> Dataset:
    """Write tokenizer and shards into an empty folder and return their description."""
    if config.reads_tokens:
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
    faults = Faults()
    documents = read_documents(config.input, faults, config.layout)
    try:
        survey = survey_documents(
            _refuse_mostly_damaged(documents, faults, config),
            validation_fraction=config.validation_fraction,
            sample_bytes=0 if config.tokenizer else _TOKENIZER_SAMPLE_BYTES,
            drop_duplicates=config.duplicates == "drop",
        )
    finally:  # Also when nothing was left: the faults are the reason.
        for line in faults.lines():
            logger.warning("%s", line)
    if survey.cut is not None:
        logger.info(
            "one document only: all after its first %d characters is validation", survey.cut
        )
    tokenizer_path = folder / TOKENIZER_NAME
    if config.vocab_size is not None:
        logger.info("training a tokenizer of %d tokens", config.vocab_size)
        train_tokenizer(survey.sample, config.vocab_size, tokenizer_path)
    else:
        assert config.tokenizer is not None
        tokenizer_path.write_bytes(Tokenizer(config.tokenizer).serialized)
    tokenizer = Tokenizer(tokenizer_path)
    if tokenizer.bos_id == tokenizer.eos_id:
        logger.info("one token, %d, begins and ends a document", tokenizer.eos_id)
    return Dataset(
        path=folder,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus_fingerprint=survey.fingerprint,
        splits=_write_splits(config, survey, tokenizer, folder, workers),
        duplicates=survey.duplicates,
        skipped=dict(sorted(faults.counts.items())),
        skipped_at=faults.examples,
        arguments=arguments,
    )


def _refuse_mostly_damaged(
    documents: Iterable[Document], faults: Faults, config: PrepareConfig
) -> Iterator[Document]:
    """Yield the documents, and at their end refuse them if too many were skipped on the way."""
    count = 0
    for document in documents:
        count += 1
        yield document
    if faults.damaged > config.max_skipped_fraction * (count + faults.damaged):
        raise ValueError(
            f"input: {faults.damaged} of {count + faults.damaged} documents cannot be used,"
            f" {'; '.join(faults.lines())}: mend the input or name the right"
            f" {config.layout.options}, or raise max_skipped_fraction {config.max_skipped_fraction}"
        )


def _write_splits(
    config: PrepareConfig, survey: Survey, tokenizer: Tokenizer, folder: Path, workers: int
) -> dict[str, Split]:
    """Encode the documents in a second pass and write the shards of both splits."""
    writers = {
        name: ShardWriter(
            folder,
            name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            shard_tokens=config.shard_tokens,
            pairs=bool(config.layout.response),
        )
        for name in (TRAIN, VALIDATION)
    }
    fingerprint = hashlib.sha256()

    def read_again() -> Iterator[Document]:
        for number, document in enumerate(read_documents(config.input, Faults(), config.layout)):
            fingerprint.update(document_digest(document.text))
            if survey.keeps(number):
                yield from survey.parts(document)

    with Progress("encoding", survey.text_bytes) as progress:
        for document, tokens in encode_documents(read_again(), tokenizer, workers):
            size = len(document.text.encode())
            split = VALIDATION if survey.is_held_out(document.text) else TRAIN
            writers[split].add(tokens, size)
            progress.update(size)
    if fingerprint.hexdigest() != survey.fingerprint:
        raise ValueError("input changed while it was read, run again when nothing writes to it")
    return {name: Split(shards=tuple(writer.close())) for name, writer in writers.items()}
