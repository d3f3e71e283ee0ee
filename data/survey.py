"""The first of two passes over a corpus: its size, the held-out split, a sample for the tokenizer.

One pass in bounded memory (8 bytes per document and the sample). Independent of tokens.
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
    cut: int | None
    """Characters of the only document that are trained on, the rest is held out; else None."""
    sample: tuple[str, ...]
    """Chunks of documents of the train split, to train a tokenizer on."""

    def is_held_out(self, text: str) -> bool:
        """Whether a document belongs to the validation split: a function of its text alone."""
        key = document_key(document_digest(text))
        return key <= self.held_out_key if self.cut is None else key == self.held_out_key

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
    documents: Iterable[Document], *, validation_fraction: float, sample_bytes: int
) -> Survey:
    """Read all documents once.

    A document is held out when its key, as a fraction of 2**64, is below `validation_fraction`,
    or the nearest bound that leaves no split empty. A single one is cut, see `Survey.parts`.

    Args:
        documents: the corpus.
        validation_fraction: expected fraction of documents to hold out.
        sample_bytes: approximate size of the tokenizer's sample; 0 for none.

    Raises:
        ValueError: there is nothing to split.
    """
    keys, fingerprint, text_bytes, first = array("Q"), hashlib.sha256(), 0, ""
    sample = _Sample(sample_bytes)
    with Progress("reading") as progress:
        for document in documents:
            digest = document_digest(document.text)
            size = len(document.text.encode())
            fingerprint.update(digest)
            first = first if keys else document.text
            keys.append(document_key(digest))
            text_bytes += size
            sample.add(keys[-1], document.text)
            progress.update(size)
    if not keys:
        raise ValueError("input holds no documents, give files with text in them")
    distinct = np.unique(np.frombuffer(keys, dtype=np.uint64))
    cut = _cut(first, validation_fraction) if len(distinct) == 1 else None
    if cut is not None and document.prompt_chars is not None:
        raise ValueError("input holds 1 different pair, give one more to hold out")
    if cut is None:
        held_out_key = _bound(distinct, validation_fraction)
    else:
        held_out_key = document_key(document_digest(first[cut:]))
        sample = _Sample(sample_bytes)
        sample.add(held_out_key + 1, first[:cut])
    return Survey(
        documents=len(keys),
        duplicates=len(keys) - len(distinct),
        text_bytes=text_bytes,
        fingerprint=fingerprint.hexdigest(),
        held_out_key=held_out_key,
        cut=cut,
        sample=sample.chunks(above_key=held_out_key),
    )


def _bound(distinct: npt.NDArray[np.uint64], validation_fraction: float) -> int:
    """Return the largest key that is held out; `distinct` is sorted."""
    bound = int(validation_fraction * _KEY_RANGE)
    return min(max(bound, int(distinct[0])), int(distinct[-1]) - 1)


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

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size = 0
        # A heap with the largest hash first: (minus the hash, key of the document, chunk).
        self._heap: list[tuple[int, int, str]] = []

    def add(self, key: int, text: str) -> None:
        """Add the chunks of one document, as far as their hashes are among the smallest."""
        if not self._limit_bytes:
            return
        for start in range(0, len(text), _SAMPLE_CHUNK_CHARS):
            chunk = text[start : start + _SAMPLE_CHUNK_CHARS]
            # Other bits than the document's key, which are small for all documents held out.
            rank = int.from_bytes(document_digest(chunk)[8:16], "big")
            entry = (-rank, key, chunk)
            if self._size >= self._limit_bytes and entry < self._heap[0]:
                continue
            heapq.heappush(self._heap, entry)
            self._size += len(chunk.encode())
            while self._size - len(self._heap[0][2].encode()) >= self._limit_bytes:
                self._size -= len(heapq.heappop(self._heap)[2].encode())

    def chunks(self, *, above_key: int) -> tuple[str, ...]:
        """Return the chunks of the documents whose key is above `above_key`, in a fixed order."""
        return tuple(chunk for _, key, chunk in sorted(self._heap) if key > above_key)
