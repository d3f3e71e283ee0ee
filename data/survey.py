"""What the first pass found in all pieces, put together: sizes, the held-out split, duplicates.

Takes memory for neither the documents nor their keys, but for a range of keys at a time; for near
duplicates see `data.pieces.near_duplicates`.
Independent of tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.pieces.key_ranges import KEY_RANGE, KeyRanges, kept_keys
from data.pieces.near_duplicates import drop_near_duplicates
from data.pieces.sample import Sample, read_chunks
from data.pieces.units import DOCUMENT, Unit, map_array, read_unit
from data.row_layout import Document, RowLayout
from data.text_keys import text_digest, text_key


@dataclass(frozen=True)
class HeldOut:
    """Which documents are the validation split: a function of their text alone."""

    key: int
    """Documents whose key is at most this are; of a single distinct document, the part of this key
    is."""
    largest_bytes: int | None = None
    """Larger documents are not held out; None: of any size."""
    cut: int | None = None
    """Characters of the only document that are trained on, the rest is held out; else None."""

    def holds(self, key: int, text_bytes: int) -> bool:
        """Whether a document, or the part of the only one, belongs to the validation split."""
        if self.cut is not None:
            return key == self.key
        return key <= self.key and (self.largest_bytes is None or text_bytes <= self.largest_bytes)

    def parts(self, document: Document) -> list[Document]:
        """Return the document, or its two parts where it is the only one.

        The second, held out, is `validation_fraction` of the characters, from the last line end
        within as many characters before, where there is one.
        """
        if self.cut is None:
            return [document]
        texts = (document.text[: self.cut], document.text[self.cut :])
        return [Document(document.origin, text) for text in texts]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The result of the first pass."""

    documents: int
    duplicates: int
    """Documents whose text repeats that of an earlier one."""
    text_bytes: int
    """Of the documents in the dataset."""
    fingerprint: str
    """sha256 over the sha256 of every document, in order."""
    held_out: HeldOut


def combine(
    units: Sequence[Unit],
    folder: Path,
    layout: RowLayout,
    *,
    validation_fraction: float,
    drop_duplicates: bool = False,
    near_threshold: float | None = None,
) -> Survey:
    """Put together what was found in all units.

    A document is held out when its key, as a fraction of 2**64, is below `validation_fraction`,
    or the nearest bound that leaves no split empty. Where these hold much more of the text than
    that, large ones stay in training, see `_limit`. A single one is cut, see `HeldOut.parts`.

    Args:
        units: all of the corpus, in order.
        folder: of their files; that of `kept` is added, where duplicates are dropped.
        layout: the fields of rows.
        validation_fraction: expected fraction of documents to hold out.
        drop_duplicates: leave out documents whose text, by its key, is that of an earlier one.
        near_threshold: leave out also those that nearly repeat an earlier one, by this share of
            equal words in a row; None: no others.

    Raises:
        ValueError: there is nothing to split.
    """
    documents, fingerprint = _count_documents(units, folder)
    if not documents:
        raise ValueError("input holds no documents, give files with text in them")
    keys = KeyRanges(units, folder, drop_duplicates=drop_duplicates)
    if drop_duplicates:
        keys.mark_first()
    if near_threshold is not None:
        drop_near_duplicates(units, folder, near_threshold)
    totals = _count(keys)
    if totals.texts > 1:
        held_out = _limit(keys, totals, validation_fraction)
    elif layout.is_learnt_in_part:
        raise ValueError("input holds 1 different pair, give one more to hold out")
    else:
        held_out = _end_of(_first_text(units, folder, layout), validation_fraction)
    return Survey(
        documents=documents,
        duplicates=documents - totals.texts,
        text_bytes=totals.text_bytes,
        fingerprint=fingerprint,
        held_out=held_out,
    )


def gather_sample(
    units: Sequence[Unit],
    folder: Path,
    layout: RowLayout,
    held_out: HeldOut,
    *,
    sample_bytes: int,
    drop_duplicates: bool = False,
) -> list[str]:
    """Return chunks of the documents that are trained on, to train a tokenizer on."""
    if held_out.cut is None:
        sample = Sample(sample_bytes, distinct=drop_duplicates)
        for unit in units:
            for chunk in read_chunks(unit.path(folder, "sample")):
                sample.add_chunk(chunk)
    else:
        sample = Sample(sample_bytes)
        text = _first_text(units, folder, layout)[: held_out.cut]
        sample.add(held_out.key + 1, text, len(text.encode()))
    chunks = [
        chunk for chunk in sample.chunks() if not held_out.holds(chunk.key, chunk.document_bytes)
    ]
    if drop_duplicates and held_out.cut is None:  # Near ones are still among them.
        kept = kept_keys(units, folder, {chunk.key for chunk in chunks})
        chunks = [chunk for chunk in chunks if chunk.key in kept]
    return [chunk.text for chunk in chunks]


def _count_documents(units: Sequence[Unit], folder: Path) -> tuple[int, str]:
    """Return the number of documents, and the sha256 over the sha256 of each."""
    count, fingerprint = 0, hashlib.sha256()
    for unit in units:
        table = map_array(unit.path(folder, "documents"), DOCUMENT)
        count += len(table)
        fingerprint.update(table["digest"].tobytes())
    return count, fingerprint.hexdigest()


def _first_text(units: Sequence[Unit], folder: Path, layout: RowLayout) -> str:
    return next(document.text for unit in units for document in read_unit(unit, folder, layout))


class _Totals(NamedTuple):
    """Counts of different texts."""

    texts: int
    text_bytes: int
    """Of all documents with these texts."""
    least_key: int
    greatest_key: int
    least_bytes: int


def _count(keys: KeyRanges) -> _Totals:
    parts = [
        _Totals(
            len(texts.keys),
            int(texts.all_bytes.sum()),
            int(texts.keys[0]),
            int(texts.keys[-1]),
            int(texts.bytes.min()),
        )
        for texts in keys
    ]
    counts, sizes, first, last, least = zip(*parts, strict=True)
    return _Totals(sum(counts), sum(sizes), first[0], last[-1], min(least))


def _limit(keys: KeyRanges, totals: _Totals, validation_fraction: float) -> HeldOut:
    """Return what is held out: texts up to a key, where that is needed up to a size as well.

    A size is given where the documents below the bound would be more than twice the share of the
    text asked for, or of a document in a corpus of few. Then those up to that share are held out,
    in the order of their keys, as far as they stay below twice of it; the first always.
    """
    bound = int(validation_fraction * KEY_RANGE)
    bound = min(max(bound, totals.least_key), totals.greatest_key - 1)
    share = max(validation_fraction, min(1 / totals.texts, 0.25))
    most = 2 * share * totals.text_bytes
    if sum(int(texts.all_bytes[texts.keys <= bound].sum()) for texts in keys) <= most:
        return HeldOut(bound)
    largest = max(int(share * totals.text_bytes), totals.least_bytes)
    last, held_out_bytes = None, 0
    for texts in keys:
        small = texts.bytes <= largest
        found, ends = texts.keys[small], held_out_bytes + np.cumsum(texts.all_bytes[small])
        below = np.flatnonzero((ends <= most) & (found <= bound))
        if len(below):
            last = int(found[below[-1]])
        elif last is None and len(found):
            last = int(found[0])
        held_out_bytes = int(ends[-1]) if len(ends) else held_out_bytes
    assert last is not None
    return HeldOut(last, largest)


def _end_of(text: str, validation_fraction: float) -> HeldOut:
    """Return that the end of the only text is held out."""
    end = len(text) - max(round(len(text) * validation_fraction), 1)
    cut = text.rfind("\n", max(2 * end - len(text), 0), end) + 1 or end
    if text[:cut] in ("", text[cut:]):
        raise ValueError(
            "input holds 1 different document, too short to be split into training and validation,"
            " give more text"
        )
    return HeldOut(text_key(text_digest(text[cut:])), cut=cut)
