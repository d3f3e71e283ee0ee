"""The order in which the windows of one source are read: epoch by epoch, each window once.

An epoch may have begun with windows of another length. What is left of it is then read in the new
ones, those of which at least half is new: no other choice reads fewer tokens twice or too late.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.permutation import permute
from data.windows import Packing, Windows

Ids = npt.NDArray[np.int64]
Spans = tuple[Ids, Ids]
"""Where parts of a stream begin and end; ascending, none overlaps another."""


@dataclass(frozen=True)
class Stretch:
    """Windows of one length that were read of a source, one after the other."""

    packing: Packing
    seq_len: int
    turns: int
    """Their number."""


class WindowOrder:
    """The window of each turn of a source.

    Args:
        size: number of windows.
        seed: fixes the order.
        shuffle: False reads the windows in order.
        epoch: the epoch of the first turn.
        left: (count,) int64, the windows of that epoch; None: all.
        turns: turns before those that are asked for.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        shuffle: bool = True,
        epoch: int = 0,
        left: Ids | None = None,
        turns: int = 0,
    ) -> None:
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epoch, self._left, self._turns = epoch, left, turns
        self._in_first = size if left is None else len(left)

    def windows(self, turns: Ids) -> Ids:
        """Return the window of each turn, (count,) int64."""
        turns = turns + self._turns
        window = np.empty_like(turns)
        first = turns < self._in_first
        index = self._permute(turns[first], np.full_like(turns[first], self._epoch), self._in_first)
        window[first] = index if self._left is None else self._left[index]
        epoch, index = np.divmod(turns[~first] - self._in_first, self._size)
        window[~first] = self._permute(index, self._epoch + 1 + epoch, self._size)
        return window

    def epochs(self, turns: float) -> float:
        """Return the epochs read after so many turns; of tokens if windows have changed."""
        return self._epoch + (self._size - self._in_first + self._turns + turns) / self._size

    def epoch_in_progress(self, turns: int) -> tuple[int, Ids, bool]:
        """Return the epoch after so many turns, its windows read, and whether those are all of it.

        They are not where it began with other windows.
        """
        if turns < self._in_first:
            return self._epoch, self.windows(np.arange(turns) - self._turns), self._left is None
        epochs, rest = divmod(turns - self._in_first, self._size)
        read = self.windows(np.arange(turns - rest, turns) - self._turns)
        return self._epoch + 1 + epochs, read, True

    def _permute(self, index: Ids, epoch: Ids, size: int) -> Ids:
        if not self._shuffle or not len(index):
            return index
        return permute(index, epoch, size=size, seed=self._seed)


@dataclass(frozen=True)
class Change:
    """What a change of windows does to the epoch in progress, in tokens."""

    unread: int = 0
    """Not read before in this epoch."""
    postponed: int = 0
    """Those of them that are left to the next epoch."""
    repeated: int = 0
    """Those read before that are read again."""


def order_after(
    stretches: Sequence[Stretch], cut: Sequence[Windows], *, seed: int
) -> tuple[WindowOrder, Change]:
    """Return the order of a source's windows after these stretches, the last of which goes on.

    Args:
        stretches: all there were, oldest first.
        cut: the source's windows of each.
        seed: fixes the order.
    """
    epoch, read = 0, (np.empty(0, np.int64), np.empty(0, np.int64))
    for stretch, windows in zip(stretches[:-1], cut, strict=False):
        if not stretch.turns:
            continue
        left, _ = _left(windows, read)
        order = WindowOrder(len(windows), seed=seed, epoch=epoch, left=left)
        epoch, indices, whole = order.epoch_in_progress(stretch.turns)
        begins, ends = windows.spans()
        indices = np.sort(indices)
        now = begins[indices], ends[indices]
        read = now if whole else _union(read, now)
    size, turns = len(cut[-1]), stretches[-1].turns
    left, change = _left(cut[-1], read)
    return WindowOrder(size, seed=seed, epoch=epoch, left=left, turns=turns), change


def _left(windows: Windows, read: Spans) -> tuple[Ids | None, Change]:
    """Return the windows of which at least half is not read yet; None if nothing is read."""
    if not len(read[0]):
        return None, Change()
    begins, ends = windows.spans()
    old = _covered(read, ends) - _covered(read, begins)
    new = ends - begins - old
    kept = (new >= old) & (new > 0)
    change = Change(int(new.sum()), int(new[~kept].sum()), int(old[kept].sum()))
    return np.flatnonzero(kept), change


def _covered(spans: Spans, positions: Ids) -> Ids:
    """Return how many positions before each of `positions` lie in a span."""
    begins, ends = spans
    before = np.concatenate([[0], np.cumsum(ends - begins)])
    count = np.searchsorted(begins, positions, side="right")  # spans that have begun
    last = np.maximum(count - 1, 0)
    beyond = np.where(count > 0, np.maximum(ends[last] - positions, 0), 0)
    covered: Ids = before[count] - beyond
    return covered


def _union(a: Spans, b: Spans) -> Spans:
    """Return the spans that cover what those of a or of b do."""
    begins, ends = (np.concatenate(pair) for pair in zip(a, b, strict=True))
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    opens = np.append(True, begins[1:] > ends[:-1])
    return begins[opens], ends[np.append(opens[1:], True)]
