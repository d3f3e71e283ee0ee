"""Datasets out of token ids that other programs made: from files or rows to a folder.

Files stay where they are. Rows, and Megatron's documents that no token ends, are copied.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.boundaries import Ids, Marks
from data.dataset import TOKENIZER_NAME, Dataset, Split
from data.faults import Faults
from data.sources.listing import list_sources
from data.token_ids.copying import Documents, copy_documents
from data.token_ids.files import TokenFile, open_token_file
from data.token_ids.rows import read_token_rows
from data.token_ids.splitting import TokenOptions, list_token_files, split_token_files
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_CHECKED_ENDS = 1000


def holds_tokens(inputs: Sequence[str], options: TokenOptions) -> bool:
    """Whether the inputs are token ids and not text.

    Raises:
        ValueError: Some are, and some are not.
    """
    return bool(options.tokens_field) or list_token_files(inputs) is not None


def describe_tokens(
    inputs: Sequence[str],
    options: TokenOptions,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    arguments: Mapping[str, object],
    validation_fraction: float,
    shard_tokens: int,
) -> Dataset:
    """Write tokenizer and shards, if any, into an empty folder and return their description.

    Raises:
        ValueError: The input is damaged, or of another tokenizer.
    """
    faults = Faults()
    splits: dict[str, Split]
    marks: Marks = "both"
    duplicates = 0
    if (documents := _to_copy(inputs, options, tokenizer, faults)) is not None:
        splits, duplicates = copy_documents(
            documents,
            tokenizer,
            folder,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
        )
    else:
        splits, marks = split_token_files(inputs, tokenizer, options, validation_fraction)
        logger.info("token ids stay in the files of the input, which the dataset needs")
        if marks == "first" and tokenizer.bos_id != tokenizer.eos_id:
            logger.warning("no EOS ends the documents: what learns from them never ends a text")
    for line in faults.lines():
        logger.warning("%s", line)
    (folder / TOKENIZER_NAME).write_bytes(tokenizer.serialized)
    shards = [record.sha256 for split in splits.values() for record in split.shards]
    return Dataset(
        path=folder,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus_fingerprint=hashlib.sha256("".join(shards).encode()).hexdigest(),
        splits=splits,
        duplicates=duplicates,
        skipped=dict(sorted(faults.counts.items())),
        skipped_at=faults.examples,
        marks=marks,
        arguments=arguments,
    )


def _to_copy(
    inputs: Sequence[str], options: TokenOptions, tokenizer: Tokenizer, faults: Faults
) -> Documents | None:
    """Return what reads the documents that have to be copied; None where the files can stay."""
    if options.tokens_field:
        sources = [source for given in inputs for source in list_sources(given, Faults())]
        counted = iter([faults])  # In the first pass alone.

        def read_rows() -> Iterator[Ids]:
            found = next(counted, Faults())
            for source in sources:
                yield from read_token_rows(source, options.tokens_field, found)

        return read_rows
    dtype = options.raw_dtype(tokenizer.vocab_size)
    files = [open_token_file(path, dtype) for path in list_token_files(inputs) or []]
    if all(_ends_documents(file, tokenizer.eos_id) for file in files):
        return None
    if any(file.lengths is None for file in files):
        raise ValueError(
            "input mixes documents without an EOS and files that do not list their documents, "
            "prepare them by themselves"
        )
    return lambda: (ids for file in files for ids in _listed_documents(file))


def _ends_documents(file: TokenFile, eos_id: int) -> bool:
    """Whether EOS ends the documents of a file, by the first ones, if the file lists them."""
    if file.lengths is None:
        return True
    ids, stop = file.read(), 0
    for length in file.lengths[:_CHECKED_ENDS].tolist():
        stop += length
        if length and ids[stop - 1 : stop][0] != eos_id:
            return False
    return True


def _listed_documents(file: TokenFile) -> Iterator[Ids]:
    assert file.lengths is not None
    ids, begin = file.read(), 0
    for length in file.lengths.tolist():
        if length:
            yield ids[begin : begin + length].astype("int64")
        begin += length
