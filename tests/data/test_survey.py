import hashlib
import json
import random
import tempfile
from pathlib import Path

import pytest

import data.pieces.key_ranges
from data.pieces.plan import Piece
from data.pieces.surveying import SurveyPiece
from data.pieces.units import Unit
from data.row_layout import Document, RowLayout
from data.sources.source import Source
from data.survey import combine, gather_sample
from data.text_keys import text_digest, text_key


class Found:
    """What is found in some texts, of which a unit has a few and a range of keys a few others."""

    def __init__(self, texts, fraction, sample_bytes, drop):
        with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.pieces.key_ranges, "KEYS_AT_ONCE", 7)
            folder, layout = Path(name), RowLayout()
            work = SurveyPiece(folder, layout, sample_bytes, drop)
            units = []
            for number, start in enumerate(range(0, len(texts), 5)):
                path = folder / f"{number}.jsonl"
                rows = [json.dumps({"text": text}) for text in texts[start : start + 5]]
                path.write_text("\n".join(rows))
                units.append(Unit(Piece((Source(path, path.name),)), number))
                work((number, units[-1].piece))
            self.survey = combine(
                units, folder, layout, validation_fraction=fraction, drop_duplicates=drop
            )
            held_out, options = self.survey.held_out, {"sample_bytes": sample_bytes}
            self.sample = tuple(
                gather_sample(units, folder, layout, held_out, **options, drop_duplicates=drop)
            )

    def __getattr__(self, name):
        return getattr(self.survey, name)

    def is_held_out(self, text):
        return self.held_out.holds(text_key(text_digest(text)), len(text.encode()))


def survey(texts, *, fraction=0.1, sample_bytes=0, drop=False):
    return Found(texts, fraction, sample_bytes, drop)


@pytest.mark.parametrize("seed", range(5))
def test_large_documents_are_held_out_no_further_than_twice_the_share(seed: int) -> None:
    draw = random.Random(seed)
    texts = [f"{n} " * int(draw.paretovariate(0.7) * 50) for n in range(81)]
    for fraction in (0.01, 0.05):
        seen = survey(texts, fraction=fraction, sample_bytes=10**9)
        share = sum(len(t) for t in texts if seen.is_held_out(t)) / sum(map(len, texts))
        assert 0 < share <= 2 * max(fraction, 1 / 81)
        trained = {t[:16384] for t in texts if not seen.is_held_out(t)}
        assert trained <= set(seen.sample), "what is trained on is in the tokenizer's sample"


def test_of_repeated_documents_the_first_alone_is_kept() -> None:
    texts = random.Random(0).choices([f"text {n}" for n in range(40)], k=200)
    seen = survey(texts, fraction=0.2, sample_bytes=10**6, drop=True)
    kept = [*dict.fromkeys(texts)]
    assert seen.duplicates == 200 - len(kept)
    assert seen.text_bytes == sum(map(len, kept))
    assert sorted(seen.sample) == sorted(text for text in kept if not seen.is_held_out(text))


def held_out(texts: list[str], fraction: float) -> set[str]:
    seen = survey(texts, fraction=fraction)
    return {text for text in texts if seen.is_held_out(text)}


def test_split_follows_the_first_64_bits_of_sha256_of_the_text() -> None:
    texts = [f"text {n}" for n in range(500)]
    expected = {
        text
        for text in texts
        if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 2**64 / 10
    }
    assert 30 < len(expected) < 70
    assert held_out(texts, 0.1) == expected


def test_split_does_not_depend_on_order_or_repetition() -> None:
    texts = [f"text {n}" for n in range(300)]
    shuffled = random.Random(0).sample(texts * 3, k=900)
    assert held_out(texts, 0.05) == held_out(shuffled, 0.05)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_fraction_leaves_a_split_empty(count: int) -> None:
    texts = [f"text {n}" for n in range(count)]
    by_key = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert held_out(texts, 1e-9) == {by_key[0]}
    assert held_out(texts, 1 - 1e-9) == {*by_key[:-1]}


def test_counts_and_fingerprint_cover_every_document() -> None:
    seen = survey(["a", "caf\u00e9", "a", "b", "a"])
    assert (seen.documents, seen.duplicates, seen.text_bytes) == (5, 2, 9)
    parts = b"".join(hashlib.sha256(t.encode()).digest() for t in ("a", "caf\u00e9", "a", "b", "a"))
    assert seen.fingerprint == hashlib.sha256(parts).hexdigest()


def test_sample_is_bounded_and_the_same_in_any_order() -> None:
    texts = [f"{n} " * 2000 for n in range(200)]
    seen = survey(texts, sample_bytes=100_000)
    # About a tenth of it is held out, and so missing; one chunk more than the limit may be there.
    assert 75_000 <= sum(map(len, seen.sample)) < 100_000 + 16_384
    assert survey(texts[::-1], sample_bytes=100_000).sample == seen.sample


def test_sample_of_a_small_corpus_is_the_train_split_exactly() -> None:
    texts = [f"text {n}" for n in range(50)]
    seen = survey(texts, fraction=0.3, sample_bytes=10**6)
    assert set(seen.sample) == {text for text in texts if not seen.is_held_out(text)}
    fallback = survey(texts, fraction=1e-9, sample_bytes=10**6)
    assert len(fallback.sample) == 49


@pytest.mark.parametrize(
    ("text", "fraction", "held_out"),
    [
        ("one\ntwo\nthree\nfour", 0.4, "three\nfour"),  # 7 of 18, back to the line's beginning.
        ("one\ntwo\nthree\nfour\n", 0.01, "\n"),  # A line end before is further than 1 more.
        ("a line without an end", 0.2, " end"),
        ("x\n" * 50, 0.1, "x\n" * 5),
    ],
)
def test_end_of_the_only_document_is_held_out(text: str, fraction: float, held_out: str) -> None:
    seen = survey([text, text], fraction=fraction, sample_bytes=1000)
    head, tail = seen.held_out.parts(Document("a", text))
    assert head.text + tail.text == text
    assert tail.text == held_out
    assert [seen.is_held_out(part.text) for part in (head, tail)] == [False, True]
    assert seen.sample == (head.text,)
    assert head.origin == tail.origin == "a"


def test_documents_stay_whole_where_there_are_two() -> None:
    document = Document("a", "one\ntwo\n")
    assert survey(["one\ntwo\n", "b"]).held_out.parts(document) == [document]


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no documents"), (["a"], "1 different"), (["aa", "aa"], "1 different")],
)
def test_corpus_that_cannot_be_split_is_a_value_error(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        survey(texts)
