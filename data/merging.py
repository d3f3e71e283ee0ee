"""Shards of a dataset out of the tokens of its units: the same bytes however these were cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.dataset import VALIDATION
from data.pieces.units import ENCODED, Unit, read_array
from data.shards import ShardHeader, ShardRecord, write_shard

_BLOCK_TOKENS = 2**20


class Tokens(NamedTuple):
    """Tokens in a row in the file of a unit."""

    path: Path
    start: int
    end: int


@dataclass
class Shard:
    """A shard to write."""

    name: str
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    parts: list[Tokens] = field(default_factory=list)


def plan_shards(
    units: Sequence[Unit], folder: Path, split: str, shard_tokens: int
) -> Iterator[Shard]:
    """Yield the shards of a split; one ends with the document that reaches `shard_tokens`.

    Args:
        units: all of the corpus, in order.
        folder: of their files.
        split: the name of the split.
        shard_tokens: least number of tokens, but of the last shard.
    """
    shards = 0
    shard = Shard(f"{split}-{shards:05d}.tokens")
    for unit in units:
        rows = read_array(unit.path(folder, "encoded"), ENCODED)
        rows = rows[rows["is_held_out"] == (split == VALIDATION)]
        ends = np.cumsum(rows["tokens"], dtype=np.int64)
        start, begin = 0, 0  # The document, and its first token.
        while start < len(rows):
            reached = np.searchsorted(ends, begin + shard_tokens - shard.tokens)
            end = min(int(reached) + 1, len(rows))
            count = int(ends[end - 1]) - begin
            shard.parts.append(Tokens(unit.path(folder, split), begin, begin + count))
            shard.tokens += count
            shard.documents += end - start
            shard.text_bytes += int(rows["bytes"][start:end].sum())
            start, begin = end, begin + count
            if shard.tokens >= shard_tokens:
                yield shard
                shards += 1
                shard = Shard(f"{split}-{shards:05d}.tokens")
    if shard.documents:
        yield shard


@dataclass(frozen=True)
class WriteShard:
    """Writes a shard where it is called.

    Args:
        folder: of the dataset.
        dtype: of a token on disk.
        vocab_size: goes into the header, like the next.
        tokenizer_fingerprint: see `ShardHeader`.
    """

    folder: Path
    dtype: np.dtype[np.integer]
    vocab_size: int
    tokenizer_fingerprint: str

    def __call__(self, shard: Shard) -> ShardRecord:
        """Write the shard and return its entry in `dataset.json`."""
        header = ShardHeader(
            dtype=self.dtype.str,
            tokens=shard.tokens,
            documents=shard.documents,
            text_bytes=shard.text_bytes,
            vocab_size=self.vocab_size,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
        )
        return write_shard(self.folder / shard.name, header, self._blocks(shard))

    def _blocks(self, shard: Shard) -> Iterator[npt.NDArray[np.integer]]:
        for path, start, end in shard.parts:
            for begin in range(start, end, _BLOCK_TOKENS):
                yield read_array(path, self.dtype, begin, min(begin + _BLOCK_TOKENS, end))
