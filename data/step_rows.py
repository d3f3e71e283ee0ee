"""Which rows of the mixture each step reads: the one map from steps to rows.

Rows are read in ascending order, each once, whatever the size of the batch: a step takes the rows
that follow those of the step before. Ranges of rows that a rollback has skipped are passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.batch_ramp import BatchRamp

Ids = npt.NDArray[np.int64]
Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of row numbers."""


def row_numbers(turns: Ids, skipped: Sequence[tuple[int, int]]) -> Ids:
    """Return the row that is read at each turn: the turn-th number, from 0, that is not skipped.

    Args:
        turns: (count,) int64, from 0.
        skipped: half-open ranges [start, stop) of rows that are never read, in any order; they may
            overlap.
    """
    rows, behind = turns.copy(), 0  # `behind` is the end of the ranges so far.
    for start, stop in sorted(skipped):
        length = max(stop - max(start, behind), 0)
        rows[rows >= max(start, behind)] += length
        behind = max(stop, behind)
    return rows


@dataclass(frozen=True)
class StepRows:
    """The rows of every step from `step` on."""

    step: int
    """A step t, and"""
    rows: int
    """the number of rows read before it."""
    batch: BatchRamp
    """Rows of each step."""
    skipped: Ranges = ()
    """Rows that are never read."""

    def before(self, t: int) -> int:
        """Return the number of rows read before step t."""
        return self.rows + self.batch.before(t) - self.batch.before(self.step)

    def at(self, t: int) -> Ids:
        """Return the rows of step t, (its batch,) int64, ascending."""
        return row_numbers(self.before(t) + np.arange(self.batch.at(t)), self.skipped)

    def first(self, t: int) -> int:
        """Return the first row of step t."""
        return int(self.at(t)[0])
