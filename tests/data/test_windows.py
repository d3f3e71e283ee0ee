import logging

import numpy as np
import pytest

from data.boundaries import Boundaries
from data.shards import NO_LOSS, TokenStream
from data.windows import (
    DocumentWindows,
    StreamWindows,
    find_documents,
    open_windows,
    spread,
)

BOS, EOS = 1, 2
APART, SHARED = Boundaries(BOS, EOS), Boundaries(BOS, BOS)


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Return documents of so many tokens, BOS and EOS included, no other token twice."""
    fresh = iter(range(10, 10_000))
    return [[BOS, *(next(fresh) for _ in range(n - 2)), EOS] for n in lengths]


def stream_of(documents: list[list[int]], parts: int = 2) -> TokenStream:
    flat = [token for document in documents for token in document]
    return TokenStream(np.array_split(np.array(flat, dtype=np.uint16), parts))


def test_documents_stay_whole_and_in_order() -> None:
    lengths = np.random.default_rng(0).integers(3, 12, 50).tolist()
    documents = documents_of(lengths)
    windows = DocumentWindows(stream_of(documents, parts=7), 16, APART)
    read = []
    for i in range(len(windows)):
        tokens, labels = windows.read(i)
        assert tokens.shape == labels.shape == (16,)
        numbers = APART.document_numbers(tokens)
        rows = [tokens[numbers == n].tolist() for n in range(1, numbers[-1] + 1)]
        whole = [row for row in rows if row != [BOS]]  # The rest is padding.
        assert rows == whole + [[BOS]] * (len(rows) - len(whole))
        read += whole
        used = sum(map(len, whole))
        assert labels[: used - 1].tolist() == tokens[1:used].tolist()
        assert (labels[used - 1 :] == NO_LOSS).all()
        if i + 1 < len(windows):
            first, _ = windows.read(i + 1)
            length = first.tolist().index(EOS) + 1
            assert used + length > 16, "the next document would have fitted"
    assert read == documents
    assert windows.dropped_tokens == 0


def test_a_document_longer_than_a_window_is_cut_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    documents = documents_of([5, 11, 4, 8])
    with caplog.at_level(logging.WARNING):
        windows = DocumentWindows(stream_of(documents), 8, APART)
    assert "1 of 4 documents are longer than seq_len 8: 3 tokens" in caplog.text
    assert windows.dropped_tokens == 3
    tokens = [windows.read(i)[0].tolist() for i in range(len(windows))]
    assert tokens == [
        documents[0] + [BOS] * 3,
        documents[1][:8],
        documents[2] + [BOS] * 4,
        documents[3],
    ]
    assert windows.read(1)[1].tolist() == [*documents[1][1:8], NO_LOSS]


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_what_is_not_to_be_learnt_is_read_and_has_no_label(packing) -> None:
    stored = np.array([~BOS, ~5, ~6, 7, 8, EOS, ~BOS, ~9, 10, EOS], dtype=np.int32)
    stream = TokenStream([stored[:4], stored[4:]])
    assert stream.read(0, 10).tolist() == [BOS, 5, 6, 7, 8, EOS, BOS, 9, 10, EOS]
    tokens, labels = open_windows(stream, packing, seq_len=9, boundaries=APART).read(0)
    if packing == "stream":
        assert tokens.tolist() == [BOS, 5, 6, 7, 8, EOS, BOS, 9, 10]
        assert labels.tolist() == [NO_LOSS, NO_LOSS, 7, 8, EOS, NO_LOSS, NO_LOSS, 10, EOS]
    else:
        assert tokens.tolist() == [BOS, 5, 6, 7, 8, EOS, BOS, BOS, BOS]
        assert labels.tolist() == [NO_LOSS, NO_LOSS, 7, 8, EOS] + [NO_LOSS] * 4


def test_spread_windows_reach_from_the_first_to_near_the_last() -> None:
    windows = StreamWindows(TokenStream([np.arange(103, dtype=np.uint16)]), 10)
    assert spread(windows, 5) == [0, 2, 4, 6, 8]
    assert spread(windows, 99) == list(range(10))
    assert windows.dropped_tokens == 2


def test_documents_are_numbered_from_what_a_row_begins_with() -> None:
    tokens = np.array([[7, 8, BOS, 9, BOS], [BOS, 3, 4, 5, 6]])
    assert APART.document_numbers(tokens).tolist() == [[0, 0, 1, 1, 2], [1, 1, 1, 1, 1]]


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="data: 1 tokens, prepare a larger dataset"):
        open_windows(TokenStream([np.ones(1, np.uint16)]), "stream", seq_len=1, boundaries=APART)
    with pytest.raises(ValueError, match="seq_len 9 needs 10 tokens but the data has 5"):
        open_windows(TokenStream([np.ones(5, np.uint16)]), "stream", seq_len=9, boundaries=APART)
    with pytest.raises(ValueError, match="data of 5 tokens has no document"):
        open_windows(
            TokenStream([np.zeros(5, np.uint16)]), "documents", seq_len=9, boundaries=APART
        )
    with pytest.raises(ValueError, match="seq_len 0 must be at least 1"):
        StreamWindows(TokenStream([np.ones(5, np.uint16)]), 0)


@pytest.mark.parametrize("seq_len", [16, 7])
def test_one_token_may_begin_and_end_a_document(monkeypatch, seq_len: int) -> None:
    monkeypatch.setattr("data.windows._SCAN", 5)  # documents begin at every place of a scan
    lengths = np.random.default_rng(0).integers(3, seq_len, 60).tolist()
    documents = documents_of(lengths)
    shared = [[BOS, *document[1:-1], BOS] for document in documents]
    apart = DocumentWindows(stream_of(documents, parts=7), seq_len, APART)
    windows = DocumentWindows(stream_of(shared, parts=7), seq_len, SHARED)
    assert len(windows) == len(apart)
    ends = 0
    for i in range(len(windows)):
        (tokens, labels), (their_tokens, their_labels) = windows.read(i), apart.read(i)
        assert tokens.tolist() == np.where(their_tokens == EOS, BOS, their_tokens).tolist()
        assert labels.tolist() == np.where(their_labels == EOS, BOS, their_labels).tolist()
        ends += int((their_labels == EOS).sum())
        numbers = SHARED.document_numbers(tokens[None])[0]
        assert numbers.tolist() == APART.document_numbers(their_tokens[None])[0].tolist()
    assert ends == len(documents), "each end is learnt once"


def test_rows_that_begin_anywhere_part_at_the_same_tokens_with_one_end_token() -> None:
    stream = [token for document in documents_of([4, 3, 6, 5, 3]) for token in document]
    for start in range(len(stream) - 9):
        row = np.array(stream[start : start + 9])
        apart = np.diff(APART.document_numbers(row))
        shared = np.diff(SHARED.document_numbers(np.where(row == EOS, BOS, row)))
        assert apart.tolist() == shared.tolist()


@pytest.mark.parametrize("marks", ["first", "last"])
@pytest.mark.parametrize("one_token", [False, True])
def test_documents_may_be_marked_at_one_end_alone(monkeypatch, marks, one_token: bool) -> None:
    monkeypatch.setattr("data.windows._SCAN", 5)  # documents begin at every position of a scan
    lengths = np.random.default_rng(1).integers(3, 12, 60).tolist()
    own, fresh = (slice(0, -1), 1) if marks == "first" else (slice(1, None), 0)
    documents = [document[own] for document in documents_of(lengths)]
    boundaries = Boundaries(EOS if one_token and marks == "last" else BOS, EOS, marks)
    stream = stream_of(documents, parts=7)
    starts = find_documents(stream, boundaries).tolist()
    assert starts == np.cumsum([0, *map(len, documents)])[:-1].tolist()
    windows = DocumentWindows(stream, 16, boundaries)
    read = []
    for tokens, labels in map(windows.read, range(len(windows))):
        used = np.flatnonzero(labels != NO_LOSS)[-1] + 2
        read += tokens[:used].tolist()
        parts = np.flatnonzero(np.diff(boundaries.document_numbers(tokens[:used]))) + 1
        assert [part.tolist() for part in np.split(tokens[:used], parts)] == [
            document for document in documents if document[fresh] in tokens[:used]
        ]
    assert read == [token for document in documents for token in document]
