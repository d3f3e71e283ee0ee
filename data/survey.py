"""The first of two passes over a corpus: its size, the held-out split, a sample for the tokenizer.

One pass in bounded memory (16 bytes per document and the sample). Independent of tokens.
"""

import hashlib
import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.progress import Progress
from data.row_layout import Document

_SAMPLE_CHUNK_CHARS = 16384
_KEY_RANGE = 2**64


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The result of the first pass."""

    documents: int
    duplicates: int
    """Documents whose text repeats that of an earlier one."""
    text_bytes: int
    fingerprint: str
    """sha256 over the sha256 of every document, in order."""
    held_out_key: int
    """Documents whose key is at most this are the validation split; of a single distinct document,
    the part of this key is."""
    held_out_bytes: int | None
    """Larger documents are not held out; None: of any size."""
    kept: npt.NDArray[np.bool_] | None
    """(documents,), whether each is in the dataset; None: all are."""
    cut: int | None
    """Characters of the only document that are trained on, the rest is held out; else None."""
    sample: tuple[str, ...]
    """Chunks of documents of the train split, to train a tokenizer on."""

    def is_held_out(self, text: str) -> bool:
        """Whether a document belongs to the validation split: a function of its text alone."""
        key = document_key(document_digest(text))
        if self.cut is not None:
            return key == self.held_out_key
        return _in_validation(key, len(text.encode()), self.held_out_key, self.held_out_bytes)

    def keeps(self, number: int) -> bool:
        """Whether the document of this number, from 0, is in the dataset."""
        return self.kept is None or (number < len(self.kept) and bool(self.kept[number]))

    def parts(self, document: Document) -> list[Document]:
        """Return the document, or its two parts where it is the only one.

        The second, held out, is `validation_fraction` of the characters, from the last line end
        within as many characters before, where there is one.
        """
        if self.cut is None:
            return [document]
        texts = (document.text[: self.cut], document.text[self.cut :])
        return [Document(document.origin, text) for text in texts]


def document_digest(text: str) -> bytes:
    """Return the sha256 of the UTF-8 bytes of a text."""
    return hashlib.sha256(text.encode()).digest()


def document_key(digest: bytes) -> int:
    """Return the first 64 bits of a digest as an integer: uniform in [0, 2**64)."""
    return int.from_bytes(digest[:8], "big")


def survey_documents(
    documents: Iterable[Document],
    *,
    validation_fraction: float,
    sample_bytes: int,
    drop_duplicates: bool = False,
) -> Survey:
    """Read all documents once.

    A document is held out when its key, as a fraction of 2**64, is below `validation_fraction`,
    or the nearest bound that leaves no split empty. Where these hold much more of the text than
    that, large ones stay in training, see `_limit`. A single one is cut, see `Survey.parts`.

    Args:
        documents: the corpus.
        validation_fraction: expected fraction of documents to hold out.
        sample_bytes: approximate size of the tokenizer's sample; 0 for none.
        drop_duplicates: leave out documents whose text, by its key, is that of an earlier one.

    Raises:
        ValueError: there is nothing to split.
    """
    keys, sizes, fingerprint, first = array("Q"), array("Q"), hashlib.sha256(), ""
    sample = _Sample(sample_bytes, distinct=drop_duplicates)
    with Progress("reading") as progress:
        for document in documents:
            digest = document_digest(document.text)
            size = len(document.text.encode())
            fingerprint.update(digest)
            first = first if keys else document.text
            keys.append(document_key(digest))
            sizes.append(size)
            sample.add(keys[-1], document.text)
            progress.update(size)
    if not keys:
        raise ValueError("input holds no documents, give files with text in them")
    all_keys, all_sizes = (np.frombuffer(each, dtype=np.uint64) for each in (keys, sizes))
    is_pair = document.prompt_chars is not None
    return _survey(
        all_keys,
        all_sizes,
        first,
        sample,
        validation_fraction,
        drop_duplicates,
        is_pair,
        fingerprint.hexdigest(),
    )


def _survey(
    all_keys: npt.NDArray[np.uint64],
    all_sizes: npt.NDArray[np.uint64],
    first: str,
    sample: "_Sample",
    validation_fraction: float,
    drop_duplicates: bool,
    is_pair: bool,
    fingerprint: str,
) -> Survey:
    """Split what was read; arguments as in `survey_documents`, `first` is the first text."""
    distinct, firsts, inverse = np.unique(all_keys, return_index=True, return_inverse=True)
    kept = None
    if drop_duplicates:
        kept = np.zeros(len(all_keys), dtype=np.bool_)
        kept[firsts] = True
    held_out_bytes = None
    cut = _cut(first, validation_fraction) if len(distinct) == 1 else None
    if cut is not None and is_pair:
        raise ValueError("input holds 1 different pair, give one more to hold out")
    if cut is None:
        counted = all_sizes if kept is None else all_sizes * kept
        weights = np.bincount(inverse, counted).astype(np.float64)
        held_out_key, held_out_bytes = _limit(
            distinct, all_sizes[firsts], weights, validation_fraction
        )
    else:
        held_out_key = document_key(document_digest(first[cut:]))
        sample = sample.emptied()
        sample.add(held_out_key + 1, first[:cut])
    return Survey(
        documents=len(all_keys),
        duplicates=len(all_keys) - len(distinct),
        text_bytes=int(all_sizes.sum() if kept is None else all_sizes[kept].sum()),
        fingerprint=fingerprint,
        held_out_key=held_out_key,
        held_out_bytes=held_out_bytes,
        kept=kept,
        cut=cut,
        sample=sample.chunks(held_out_key, held_out_bytes),
    )


def held_out_bound(distinct: npt.NDArray[np.uint64], validation_fraction: float) -> int:
    """Return the largest key that is held out; `distinct` is sorted."""
    bound = int(validation_fraction * _KEY_RANGE)
    return min(max(bound, int(distinct[0])), int(distinct[-1]) - 1)


def _limit(
    distinct: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.uint64],
    weights: npt.NDArray[np.float64],
    validation_fraction: float,
) -> tuple[int, int | None]:
    """Return the largest key that is held out, and the largest size, None for any.

    A size is given where the documents below the bound would be more than twice the share of the
    text asked for, or of a document in a corpus of few. Then those up to that share are held out,
    in the order of their keys, as far as they stay below twice of it; the first always.

    Args:
        distinct: the keys, sorted.
        sizes: bytes of the document of each key.
        weights: bytes of all documents of each key.
        validation_fraction: the share asked for.
    """
    bound, total = held_out_bound(distinct, validation_fraction), weights.sum()
    share = max(validation_fraction, min(1 / len(distinct), 0.25))
    if weights[distinct <= bound].sum() <= 2 * share * total:
        return bound, None
    largest = max(int(share * total), int(sizes.min()))
    small = np.flatnonzero(sizes <= largest)
    below = np.flatnonzero(
        (np.cumsum(weights[small]) <= 2 * share * total) & (distinct[small] <= bound)
    )
    return int(distinct[small[below[-1] if len(below) else 0]]), largest


def _in_validation(key: int, size: int, held_out_key: int, held_out_bytes: int | None) -> bool:
    return key <= held_out_key and (held_out_bytes is None or size <= held_out_bytes)


def _cut(text: str, validation_fraction: float) -> int:
    """Return the number of characters of the only document that are trained on."""
    end = len(text) - max(round(len(text) * validation_fraction), 1)
    cut = text.rfind("\n", max(2 * end - len(text), 0), end) + 1 or end
    if text[:cut] in ("", text[cut:]):
        raise ValueError(
            "input holds 1 different document, too short to be split into training and validation,"
            " give more text"
        )
    return cut


class _Sample:
    """The chunks of text with the smallest hashes: a uniform sample in one pass, without an RNG."""

    def __init__(self, limit_bytes: int, *, distinct: bool = False) -> None:
        self._limit_bytes = limit_bytes
        self._size = 0
        # A heap with the largest hash first: minus the hash, key of the document, chunk, size of
        # the document.
        self._heap: list[tuple[int, int, str, int]] = []
        self._present: set[tuple[int, int]] | None = set() if distinct else None

    def add(self, key: int, text: str) -> None:
        """Add the chunks of one document, as far as their hashes are among the smallest."""
        if not self._limit_bytes:
            return
        document_size = len(text.encode())
        for start in range(0, len(text), _SAMPLE_CHUNK_CHARS):
            chunk = text[start : start + _SAMPLE_CHUNK_CHARS]
            # Other bits than the document's key, which are small for all documents held out.
            rank = int.from_bytes(document_digest(chunk)[8:16], "big")
            entry = (-rank, key, chunk, document_size)
            if self._size >= self._limit_bytes and entry < self._heap[0]:
                continue
            if self._present is not None:
                if entry[:2] in self._present:
                    continue
                self._present.add(entry[:2])
            heapq.heappush(self._heap, entry)
            self._size += len(chunk.encode())
            while self._size - len(self._heap[0][2].encode()) >= self._limit_bytes:
                left = heapq.heappop(self._heap)
                self._size -= len(left[2].encode())
                if self._present is not None:
                    self._present.discard(left[:2])

    def emptied(self) -> "_Sample":
        """Return an empty sample of the same size."""
        return _Sample(self._limit_bytes)

    def chunks(self, held_out_key: int, held_out_bytes: int | None) -> tuple[str, ...]:
        """Return the chunks of the documents that are not held out, in a fixed order."""
        return tuple(
            chunk
            for _, key, chunk, size in sorted(self._heap)
            if not _in_validation(key, size, held_out_key, held_out_bytes)
        )
