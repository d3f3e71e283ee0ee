"""Sequences of one length out of a stream of tokens, in two ways. Independent of batches.

A sequence is its inputs and its labels, the token after each of them; NO_LOSS where there is none
or where it is not to be learnt, as in the prompts of pairs.
"""

import logging
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from data.boundaries import Boundaries
from data.shards import NO_LOSS, TokenStream

logger = logging.getLogger(__name__)

Packing = Literal["stream", "documents"]

Ids = npt.NDArray[np.int64]


class Windows(Protocol):
    """Numbered sequences of one length."""

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the stream that no sequence reads."""
        ...

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def read(self, i: int) -> tuple[Ids, Ids]:
        """Return tokens and labels of sequence i, (seq,) int64 each."""
        ...

    def spans(self) -> tuple[Ids, Ids]:
        """Return the stream positions at which each sequence begins and ends, ascending."""
        ...


class StreamWindows:
    """The stream cut every `seq_len` tokens: a window may hold the end of one document, and more.

    Window i reads tokens [i * seq_len, i * seq_len + seq_len]: seq_len inputs and, one further, as
    many labels.

    Raises:
        ValueError: the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        _check(seq_len)
        if len(stream) < seq_len + 1:
            raise ValueError(
                f"seq_len {seq_len} needs {seq_len + 1} tokens but the data has {len(stream)},"
                " give a shorter seq_len or more text"
            )
        self._stream = stream
        self._seq_len = seq_len

    @property
    def dropped_tokens(self) -> int:
        """Tokens at the end of the stream that no window reads."""
        return len(self._stream) - 1 - len(self) * self._seq_len

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._seq_len

    def read(self, i: int) -> tuple[Ids, Ids]:
        """Return tokens and labels of window i, (seq,) int64 each."""
        tokens, targets = self._stream.read_targets(i * self._seq_len, self._seq_len + 1)
        return tokens[:-1], targets[1:]

    def spans(self) -> tuple[Ids, Ids]:
        """Return the stream positions at which each window begins and ends, ascending."""
        begins = np.arange(len(self)) * self._seq_len
        return begins, begins + self._seq_len


class DocumentWindows:
    """Whole documents, as many as fit, one after the other; the rest of a window is padding.

    A document longer than a window is cut at its end. Padding is BOS without a loss: documents of
    one token each, for an attention that stays within documents. Opening reads the stream once.

    Raises:
        ValueError: there is no document.
    """

    def __init__(self, stream: TokenStream, seq_len: int, boundaries: Boundaries) -> None:
        _check(seq_len)
        starts = find_documents(stream, boundaries)
        if not len(starts):
            raise ValueError(f"data of {len(stream)} tokens has no document, prepare it again")
        lengths = np.diff(starts, append=len(stream))
        self._stream, self._seq_len, self._bos_id = stream, seq_len, boundaries.bos_id
        self._begins, self._counts = _pack(starts, np.minimum(lengths, seq_len), seq_len)
        self.dropped_tokens = int(np.maximum(lengths - seq_len, 0).sum())
        if self.dropped_tokens:
            logger.warning(
                "%d of %d documents are longer than seq_len %d: %d tokens at their ends left out",
                int((lengths > seq_len).sum()),
                len(starts),
                seq_len,
                self.dropped_tokens,
            )

    def __len__(self) -> int:
        return len(self._begins)

    def read(self, i: int) -> tuple[Ids, Ids]:
        """Return tokens and labels of window i, (seq,) int64 each."""
        count = self._counts[i]
        tokens = np.full(self._seq_len, self._bos_id, dtype=np.int64)
        labels = np.full(self._seq_len, NO_LOSS, dtype=np.int64)
        tokens[:count], targets = self._stream.read_targets(self._begins[i], count)
        labels[: count - 1] = targets[1:]
        return tokens, labels

    def spans(self) -> tuple[Ids, Ids]:
        """Return the stream positions at which each window begins and ends, ascending."""
        begins = np.asarray(self._begins, dtype=np.int64)
        return begins, begins + self._counts


def open_windows(
    stream: TokenStream, packing: Packing, *, seq_len: int, boundaries: Boundaries
) -> StreamWindows | DocumentWindows:
    """Return a stream's sequences.

    Raises:
        ValueError: the stream has no sequence of this length.
    """
    if len(stream) < 2:
        raise ValueError(f"data: {len(stream)} tokens, prepare a larger dataset")
    if packing == "documents":
        return DocumentWindows(stream, seq_len, boundaries)
    return StreamWindows(stream, seq_len)


def spread(windows: Windows, count: int) -> list[int]:
    """Return the numbers of `count` sequences spread over all of them; fewer if there are fewer."""
    count = min(count, len(windows))
    return [i * len(windows) // count for i in range(count)]


_SCAN = 2**22


def _check(seq_len: int) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len {seq_len} must be at least 1")


def find_documents(stream: TokenStream, boundaries: Boundaries) -> Ids:
    """Return the stream positions at which documents start, (documents,) int64, of whole ones."""
    is_start = boundaries.marks == "last" and len(stream) > 0  # No token comes before the first.
    found = [np.zeros(int(is_start), np.int64)]
    for begin in range(0, len(stream), _SCAN):
        before = min(begin, 1)  # the token that a start may have to follow
        tokens = stream.read(begin - before, min(_SCAN, len(stream) - begin) + before)
        found.append(begin + np.flatnonzero(boundaries.starts(tokens)[before:]))
    return np.concatenate(found)


def _pack(starts: Ids, lengths: Ids, seq_len: int) -> tuple[list[int], list[int]]:
    """Return the stream position at which each window begins, and its number of tokens.

    Documents stay in order, so a window is one part of the stream; none is longer than seq_len.
    """
    begins: list[int] = []
    counts: list[int] = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if counts and counts[-1] + length <= seq_len:
            counts[-1] += length
        else:
            begins.append(start)
            counts.append(length)
    return begins, counts
