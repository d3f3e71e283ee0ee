from collections import Counter

import numpy as np
import pytest

from data.mixture import PERIOD, Mixture, shares
from data.shards import TokenStream
from data.windows import StreamWindows

SIZES = (300, 1700, 50)


def sources() -> list[StreamWindows]:
    """Return sources whose every token encodes its source and its position in it."""
    return [
        StreamWindows(TokenStream([np.arange(2 * n + 1, dtype=np.uint32) + 10_000 * s]), 2)
        for s, n in enumerate(SIZES)
    ]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_source_has_its_share_of_each_period_and_is_read_through(shuffle: bool) -> None:
    mixture = Mixture(sources(), (1.0, 2.0, 1.0), seed=3, shuffle=shuffle)
    assert mixture.rows_per_period == [1024, 2048, 1024]
    source, window = mixture.locate(np.arange(3 * PERIOD))
    for period in np.split(source, 3):
        assert Counter(period.tolist()) == {0: 1024, 1: 2048, 2: 1024}
        # Mixed through and through: every 512 rows have about a quarter of the first.
        counts = [(part == 0).sum() for part in np.split(period, 8)]
        assert all(80 < count < 180 for count in counts)
    for s, size in enumerate(SIZES):
        seen = window[source == s]
        epochs = [seen[at : at + size].tolist() for at in range(0, len(seen) - size + 1, size)]
        assert len(epochs) == 3 * mixture.rows_per_period[s] // size
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert shuffle == (epochs[0] != sorted(epochs[0]))


def test_rows_are_a_function_of_their_number_alone() -> None:
    mixture = Mixture(sources(), (0.2, 0.5, 0.3), seed=3)
    rows = np.arange(5000)
    source, window = mixture.locate(rows)
    some = np.random.default_rng(0).permutation(5000)[:200]
    for got, all_of_them in zip(mixture.locate(some), (source, window), strict=True):
        assert (got == all_of_them[some]).all()
    other, _ = Mixture(sources(), (0.2, 0.5, 0.3), seed=4).locate(rows)
    assert (other != source).any()
    tokens, labels = mixture.read(rows[:64])
    assert (tokens // 10_000 == source[:64, None]).all()
    assert (tokens[:, 0] % 10_000 == 2 * window[:64]).all()
    assert (labels == tokens + 1).all()


def test_without_weights_sources_are_read_as_if_they_were_one() -> None:
    mixture = Mixture(sources(), seed=0)
    assert sum(mixture.rows_per_period) == PERIOD
    for share, size in zip(mixture.rows_per_period, SIZES, strict=True):
        assert share == pytest.approx(size / sum(SIZES) * PERIOD, abs=1)
    assert mixture.epochs(sum(SIZES)) == pytest.approx([1, 1, 1], rel=0.02)


def test_one_source_alone_has_every_row() -> None:
    [_, source, _] = sources()
    mixture = Mixture([source], seed=3)
    _, window = mixture.locate(np.arange(2 * 1700))
    for epoch in np.split(window, 2):
        assert sorted(epoch.tolist()) == list(range(1700))


def test_shares_are_rounded_by_largest_remainder() -> None:
    assert shares([1.0, 1.0, 1.0]) == [1366, 1365, 1365]
    assert shares([7.0]) == [PERIOD]
    assert sum(shares(np.random.default_rng(0).random(37).tolist())) == PERIOD


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_of_zero_or_less_is_refused_in_one_line(weight: float) -> None:
    with pytest.raises(ValueError, match=r"^weights: .*must be positive, leave the source out"):
        shares([1.0, weight])
    with pytest.raises(ValueError, match=r"^weights: 1e-05 of .* is less than one row in 4096"):
        shares([1.0, 1e-5])
