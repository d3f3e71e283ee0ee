"""Documents of token ids copied into shards, between BOS and EOS, as those of text are.

Two passes: the first hashes every document to choose what is held out, the second writes.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.boundaries import Ids
from data.dataset import TRAIN, VALIDATION, Split
from data.progress import Progress
from data.shards import ShardWriter, token_dtype
from data.survey import document_key, held_out_bound
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
    bound = held_out_bound(distinct, validation_fraction)
    writers = {
        name: ShardWriter(
            folder,
            name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            shard_tokens=shard_tokens,
        )
        for name in (TRAIN, VALIDATION)
    }
    dtype = token_dtype(tokenizer.vocab_size)
    with Progress("writing") as progress:
        for number, ids in enumerate(documents(), start=1):
            whole = _whole(ids, tokenizer, len(lengths), number)
            if number > len(keys) or (key := _key(whole)) != keys[number - 1]:
                raise ValueError(
                    "input changed while it was read, run again when nothing writes to it"
                )
            split = VALIDATION if key <= bound else TRAIN
            writers[split].add(whole.astype(dtype), int(lengths[whole].sum()))
            progress.update(ids.nbytes)
    splits = {name: Split(shards=tuple(writer.close())) for name, writer in writers.items()}
    return splits, len(keys) - len(distinct)


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
    return document_key(hashlib.sha256(ids.astype("<i8").tobytes()).digest())
