"""A prepared dataset: a folder of token shards, their tokenizer and `dataset.json`.

`data.prepare` writes such a folder, training and evaluation open it. Independent of batches.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.boundaries import Marks
from data.foreign_json import MAX_BYTES, build, is_plain, parse_object, shown
from data.nearest import nearest_dataset
from data.progress import Progress
from data.shards import (
    HEADER_BYTES,
    ID_DTYPES,
    MAX_VOCAB_SIZE,
    ShardRecord,
    TokenRange,
    TokenStream,
    open_elsewhere,
    open_shard,
    token_dtype,
    token_ids,
)
from data.tokenizer import Tokenizer
from data.urls import Location

DESCRIPTION_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.model"
TRAIN = "train"
VALIDATION = "validation"

_FORMAT = 1
_BLOCK_BYTES = 2**23


@dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of one split."""

    shards: tuple[ShardRecord, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens, one BOS and one EOS per document included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text; bits per byte = nats * tokens / text_bytes / ln 2."""
        return sum(shard.text_bytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The content of `dataset.json`, and its folder."""

    path: Path
    vocab_size: int
    tokenizer_fingerprint: str
    """sha256 of `tokenizer.model`."""
    corpus_fingerprint: str
    """sha256 over the documents read, in order."""
    splits: Mapping[str, Split]
    """By name: "train" and "validation"."""
    duplicates: int
    """Documents that repeat an earlier one, or nearly do; they are dropped, or kept in the split of
    the first."""
    skipped: Mapping[str, int]
    """Number of documents (or lines, rows, files) left out, by reason."""
    skipped_at: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The first few origins of each reason: file, file:line or file:row."""
    marks: Marks = "both"
    """Which tokens mark the ends of its documents, see `data.boundaries`."""
    arguments: Mapping[str, object]
    """The arguments of `data.prepare`, see `PrepareConfig.arguments`."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer of the ids."""
        return self.path / TOKENIZER_NAME

    @property
    def dropped_duplicates(self) -> bool:
        """Whether repeated documents were left out."""
        return "duplicates" in self.arguments

    @property
    def held_out_share(self) -> float:
        """Share of the tokens that is held out."""
        held_out, rest = (self.splits[name].tokens for name in (VALIDATION, TRAIN))
        return held_out / max(held_out + rest, 1)

    @property
    def holds_pairs(self) -> bool:
        """Whether a part of each document is not learnt: prompts, or the turns of others."""
        return "response" in self.arguments or "messages" in self.arguments

    @property
    def fingerprint(self) -> str:
        """sha256 that identifies the tokens: the tokenizer and the shards of every split."""
        shards = {name: [s.sha256 for s in split.shards] for name, split in self.splits.items()}
        content = json.dumps([self.tokenizer_fingerprint, shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def stream(self, split: str) -> TokenStream:
        """Open the shards of a split as one stream.

        Raises:
            ValueError: there is no such split, or a shard is missing, torn or of other tokens.
        """
        if split not in self.splits:
            raise ValueError(f"split {split} is not in {self.path}, give one of {[*self.splits]}")
        shards = []
        for record in self.splits[split].shards:
            if record.elsewhere is not None:
                shards.append(open_elsewhere(record.elsewhere, record.tokens))
                continue
            header, tokens = open_shard(self.path / record.name)
            if header.tokenizer_fingerprint != self.tokenizer_fingerprint:
                raise ValueError(
                    f"shard {self.path / record.name} was made with tokenizer"
                    f" {header.tokenizer_fingerprint} but {self.tokenizer_path} is"
                    f" {self.tokenizer_fingerprint}, prepare the dataset again"
                )
            if header.tokens != record.tokens:
                raise ValueError(
                    f"shard {self.path / record.name} has {header.tokens} tokens but"
                    f" {DESCRIPTION_NAME} lists {record.tokens}, prepare the dataset again"
                )
            shards.append(tokens)
        return TokenStream(shards)


def verify_shards(dataset: Dataset, *, part: int = 0, parts: int = 1) -> None:
    """Read every `parts`-th shard of all splits, from the `part`-th on, and check its content.

    Finds what opening does not: a file of the right size whose bytes are no longer those that were
    prepared, and ids outside the vocabulary. Each shard is read once, in blocks of 8 MB. The ranks
    of a job share the work: `part` is the rank, `parts` their number.

    Raises:
        ValueError: shards are damaged; the message names each with its reason.
    """
    records = [record for _, split in sorted(dataset.splits.items()) for record in split.shards]
    records = records[part::parts]
    size = sum(record.tokens * _item_bytes(dataset, record) for record in records)
    found = []
    with Progress("verifying shards", size, is_main=part == 0) as progress:
        for record in records:
            try:
                _verify_shard(dataset, record, progress)
            except (ValueError, OSError) as error:
                found.append(str(error))
    if found:
        raise ValueError("; ".join(found))


def _item_bytes(dataset: Dataset, record: ShardRecord) -> int:
    if record.elsewhere is not None:
        return np.dtype(record.elsewhere.dtype).itemsize
    return token_dtype(dataset.vocab_size, pairs=dataset.holds_pairs).itemsize


def _verify_shard(dataset: Dataset, record: ShardRecord, progress: Progress) -> None:
    faults: list[str] = []
    digest = hashlib.sha256()
    first = 0
    found = record.elsewhere
    if found is None:
        path = dataset.path / record.name
        dtype, offset = np.dtype(open_shard(path)[0].dtype), HEADER_BYTES
    else:
        path, dtype, offset = Path(found.path), np.dtype(found.dtype), found.offset
        open_elsewhere(found, record.tokens)
    left = record.tokens * dtype.itemsize
    with path.open("rb") as file:
        file.seek(offset if found else 0)
        digest.update(b"" if found else file.read(HEADER_BYTES))
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            digest.update(block)
            progress.update(len(block))
            ids = token_ids(np.frombuffer(block, dtype))
            if not faults and ids.max() >= dataset.vocab_size:
                index = int((ids >= dataset.vocab_size).argmax())
                faults.append(
                    f"id {ids[index]} of token {first + index} is outside the vocabulary of"
                    f" {dataset.vocab_size}"
                )
            first += len(ids)
    if digest.hexdigest() != record.sha256:
        faults.append(
            f"its sha256 is {digest.hexdigest()} but {DESCRIPTION_NAME} lists {record.sha256}"
        )
    if faults:
        raise ValueError(f"shard {path}: {' and '.join(faults)}, prepare the dataset again")


def write_description(dataset: Dataset) -> None:
    """Write `dataset.json` into the folder of the dataset."""
    description = dataclasses.asdict(dataset)
    del description["path"]
    if dataset.marks == "both":  # as in datasets of before
        del description["marks"]
    for split in description["splits"].values():
        for shard in split["shards"]:
            if shard["elsewhere"] is None:
                del shard["elsewhere"]
    content = {"format": _FORMAT, "fingerprint": dataset.fingerprint} | description
    (dataset.path / DESCRIPTION_NAME).write_text(json.dumps(content, indent=2) + "\n")


def open_dataset(path: Path) -> Dataset:
    """Open a folder that `data.prepare` wrote.

    Raises:
        ValueError: it is no dataset, or its tokenizer is not the one its shards were made with.
    """
    description_path = path / DESCRIPTION_NAME
    if path.is_file():
        folder = path.parent if path.with_name(DESCRIPTION_NAME).is_file() else "of a dataset"
        raise ValueError(f"dataset {path} is a file, name its folder {folder}")
    if not description_path.is_file():
        remedy = nearest_dataset(path, DESCRIPTION_NAME)
        if not path.exists():
            raise ValueError(f"dataset {path} does not exist, {remedy}")
        raise ValueError(f"dataset {path} has no {DESCRIPTION_NAME}, {remedy}")
    with description_path.open("rb") as file:
        dataset = read_description(file.read(MAX_BYTES + 1), path, path)
    actual = Tokenizer(dataset.tokenizer_path).fingerprint
    if actual != dataset.tokenizer_fingerprint:
        raise ValueError(
            f"tokenizer {dataset.tokenizer_path} has sha256 {actual} but the shards were made with"
            f" {dataset.tokenizer_fingerprint}, put that model back or prepare the dataset again"
        )
    return dataset


def read_description(content: bytes, path: Path, origin: Location) -> Dataset:
    """Read the content of `dataset.json`.

    Args:
        content: The content.
        path: The folder of the dataset.
        origin: Where the content is of, for messages.

    Raises:
        ValueError: It is damaged.
    """
    description = origin / DESCRIPTION_NAME
    try:
        fields = parse_object(content)
        if fields.pop("format", None) != _FORMAT:
            raise ValueError("unknown format")
        fingerprint = fields.pop("fingerprint", None)
        dataset = build(Dataset, fields | {"path": path})
        _check(dataset)
    except ValueError as error:
        raise ValueError(f"dataset {description} is damaged ({error}), prepare it again") from None
    if dataset.fingerprint != fingerprint:
        raise ValueError(f"dataset {description} was changed by hand, prepare it again")
    return dataset


def _check(dataset: Dataset) -> None:
    """Raise a ValueError for numbers that no dataset has."""
    if not 1 <= dataset.vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size: {dataset.vocab_size}, must be 1 to {MAX_VOCAB_SIZE}")
    for name, split in dataset.splits.items():
        for i, shard in enumerate(split.shards):
            field = f"splits.{name}.shards[{i}]"
            if not is_plain(shard.name):
                raise ValueError(f"{field}.name: {shown(shard.name)}, must be that of a file in it")
            if min(shard.tokens, shard.documents, shard.text_bytes) < 0:
                raise ValueError(f"{field} has a number below 0")
            if shard.elsewhere is not None:
                _check_range(shard.elsewhere, shard.tokens, f"{field}.elsewhere")
    if missing := {TRAIN, VALIDATION} - dataset.splits.keys():
        raise ValueError(f"splits.{min(missing)} is missing")


def _check_range(found: TokenRange, tokens: int, field: str) -> None:
    if found.dtype not in ID_DTYPES:
        raise ValueError(f"{field}.dtype: {shown(found.dtype)}, give one of {sorted(ID_DTYPES)}")
    end = found.offset + tokens * np.dtype(found.dtype).itemsize
    if "\0" in found.path or not 0 <= found.offset <= end <= found.file_bytes:
        raise ValueError(f"{field} is no part of a file")
