"""Documents of token ids copied into shards, between BOS and EOS, as those of text are.

Two passes: the first hashes every document to choose what is held out, the second writes.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.boundaries import Ids
from data.dataset import TRAIN, VALIDATION, Split
from data.progress import Progress
from data.shards import ShardHeader, ShardRecord, token_dtype, write_shard
from data.text_keys import text_key
from data.token_ids.piece_lengths import piece_lengths
from data.tokenizer import Tokenizer

Documents = Callable[[], Iterator[Ids]]
"""Reads all documents, (seq,) int64 each, from the first on."""


def copy_documents(
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    validation_fraction: float,
    shard_tokens: int,
) -> tuple[dict[str, Split], int]:
    """Write the shards of both splits; return them and the number of repeated documents.

    A document is held out by a hash of its ids, so its repetitions are in the same split.

    Raises:
        ValueError: There are no two different documents, or one holds ids the tokenizer has not.
    """
    lengths = piece_lengths(tokenizer)
    keys = array("Q")
    with Progress("reading") as progress:
        for ids in documents():
            keys.append(_key(_whole(ids, tokenizer, len(lengths), len(keys) + 1)))
            progress.update(ids.nbytes)
    distinct = np.unique(np.frombuffer(keys, dtype=np.uint64))
    if len(distinct) < 2:
        raise ValueError(f"input holds {len(distinct)} different documents of ids, give 2 or more")
    # At least one document is held out, and one is not.
    bound = min(max(int(validation_fraction * 2**64), int(distinct[0])), int(distinct[-1]) - 1)
    writers = {name: _Writer(folder, name, tokenizer, shard_tokens) for name in (TRAIN, VALIDATION)}
    with Progress("writing") as progress:
        for number, ids in enumerate(documents(), start=1):
            whole = _whole(ids, tokenizer, len(lengths), number)
            if number > len(keys) or (key := _key(whole)) != keys[number - 1]:
                raise ValueError(
                    "input changed while it was read, run again when nothing writes to it"
                )
            split = VALIDATION if key <= bound else TRAIN
            writers[split].add(whole, int(lengths[whole].sum()))
            progress.update(ids.nbytes)
    splits = {name: Split(shards=tuple(writer.close())) for name, writer in writers.items()}
    return splits, len(keys) - len(distinct)


class _Writer:
    """Writes the documents of one split, and holds those of one shard."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._shard_tokens, self._dtype = shard_tokens, token_dtype(tokenizer.vocab_size)
        self._records: list[ShardRecord] = []
        self._documents: list[npt.NDArray[np.integer]] = []
        self._text_bytes = self._tokens = 0

    def add(self, ids: Ids, text_bytes: int) -> None:
        self._documents.append(ids.astype(self._dtype))
        self._tokens += len(ids)
        self._text_bytes += text_bytes
        if self._tokens >= self._shard_tokens:
            self._write()

    def close(self) -> list[ShardRecord]:
        """Write what is left and return the entries of all shards."""
        if self._documents:
            self._write()
        return self._records

    def _write(self) -> None:
        header = ShardHeader(
            dtype=self._dtype.str,
            tokens=self._tokens,
            documents=len(self._documents),
            text_bytes=self._text_bytes,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
        )
        path = self._folder / f"{self._split}-{len(self._records):05d}.tokens"
        self._records.append(write_shard(path, header, self._documents))
        self._documents, self._text_bytes, self._tokens = [], 0, 0


def _whole(ids: Ids, tokenizer: Tokenizer, vocab_size: int, number: int) -> Ids:
    """Return the ids between one BOS and one EOS, whether they had these or not."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
            f"input: document {number} holds {wrong}, outside of the tokenizer's {vocab_size} ids, "
            "name the tokenizer of these ids"
        )
    begin = int(ids[0] == tokenizer.bos_id)
    stop = len(ids) - int(len(ids) > begin and ids[-1] == tokenizer.eos_id)
    return np.concatenate([[tokenizer.bos_id], ids[begin:stop], [tokenizer.eos_id]])


def _key(ids: Ids) -> int:
    return text_key(hashlib.sha256(ids.astype("<i8").tobytes()).digest())
