"""Several sources mixed into one endless sequence of rows, as a pure function of (seed, row)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data.permutation import permute
from data.window_order import WindowOrder
from data.windows import Windows

PERIOD = 4096
"""Rows in which every source has exactly its share."""

Ids = npt.NDArray[np.int64]


class Mixture:
    """An endless sequence of rows from one or more sources.

    Of every PERIOD rows, from `start` on, each source gets its share, rounded to whole rows by
    largest remainder, in an order of the period's own. The n-th row of a source is the n-th of its
    `WindowOrder`, so that every window of a source is read once before any is read again,
    independently of the other sources.

    Args:
        sources: Each with windows of the same length.
        weights: Relative, one for each source; None: its number of windows.
        seed: Fixes the order.
        shuffle: False reads each source's windows in order, in every epoch.
        start: The first row of this mixture; those before were of another.
        orders: The order of each source's windows; None: from their first epoch on.

    Raises:
        ValueError: a weight is not positive, or so small that a period has no row of its source.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        shuffle: bool = True,
        start: int = 0,
        orders: Sequence[WindowOrder] | None = None,
    ) -> None:
        self.sources = sources
        self.rows_per_period = shares(weights or [len(source) for source in sources])
        self.start = start
        self._seed = seed
        self._orders = orders or [
            WindowOrder(len(source), seed=seed + s, shuffle=shuffle)
            for s, source in enumerate(sources)
        ]

    @property
    def windows(self) -> int:
        """Number of sequences of all sources."""
        return sum(map(len, self.sources))

    def epochs(self, row: int) -> list[float]:
        """Return the epochs of each source that precede a row."""
        rows = row - self.start
        return [
            order.epochs(rows * share / PERIOD)
            for order, share in zip(self._orders, self.rows_per_period, strict=True)
        ]

    def locate(self, rows: Ids) -> tuple[Ids, Ids]:
        """Return the source of each row, and the index of its window in the source.

        Args:
            rows: (count,) int64, from `start`.
        """
        rows = rows - self.start
        source, turn = np.zeros_like(rows), rows.copy()
        if len(self.sources) > 1:
            period, row = np.divmod(rows, PERIOD)
            for number in np.unique(period).tolist():
                here = period == number
                mixed = _mix(number, self.rows_per_period, self._seed)
                source[here], turn[here] = (each[row[here]] for each in mixed)
        window = np.empty_like(rows)
        for s, order in enumerate(self._orders):
            here = source == s
            window[here] = order.windows(turn[here])
        return source, window

    def read(self, rows: Ids) -> tuple[Ids, Ids]:
        """Return tokens and labels of some rows, (count, seq) int64 each."""
        source, window = self.locate(rows)
        read = [
            self.sources[s].read(i) for s, i in zip(source.tolist(), window.tolist(), strict=True)
        ]
        tokens, labels = zip(*read, strict=True)
        return np.stack(tokens), np.stack(labels)


def turns_before(rows: int, rows_per_period: Sequence[int], seed: int) -> list[int]:
    """Return how many of the first `rows` rows of a mixture are of each source."""
    if len(rows_per_period) == 1:
        return [rows]
    periods, rest = divmod(rows, PERIOD)
    source, _ = _mix(periods, rows_per_period, seed)
    counts = np.bincount(source[:rest], minlength=len(rows_per_period))
    return [periods * s + int(n) for s, n in zip(rows_per_period, counts, strict=True)]


def _mix(period: int, rows_per_period: Sequence[int], seed: int) -> tuple[Ids, Ids]:
    """Return the source of each row of a period, and its number among all rows of it."""
    rows = np.arange(PERIOD)
    slot = permute(rows, np.full_like(rows, period), size=PERIOD, seed=seed)
    source = np.searchsorted(np.cumsum(rows_per_period), slot, side="right")
    turn = np.empty_like(rows)
    for s, share in enumerate(rows_per_period):
        turn[source == s] = period * share + np.arange(share)
    return source, turn


def shares(weights: Sequence[float]) -> list[int]:
    """Return the rows of PERIOD that each weight amounts to, by largest remainder.

    Raises:
        ValueError: a weight is not positive, or amounts to less than one row.
    """
    for weight in weights:
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"weights: {weight}, must be positive, leave the source out instead")
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
    rows = np.floor(exact).astype(np.int64)
    rows[np.argsort(rows - exact, kind="stable")[: PERIOD - rows.sum()]] += 1
    if not rows.all():
        weight = weights[int(rows.argmin())]
        raise ValueError(
            f"weights: {weight} of {sum(weights)} is less than one row in {PERIOD}, "
            "raise it or leave the source out"
        )
    return [int(count) for count in rows]
