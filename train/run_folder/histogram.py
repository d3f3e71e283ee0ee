"""Counts of numbers in bins of equal width, as sinks of metrics take them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins of equal width."""

    counts: list[int]
    low: float
    """Lower edge of the first bin, which includes all numbers below."""
    high: float
    """Upper edge of the last bin, which includes all numbers above."""

    @property
    def edges(self) -> NDArray[np.float64]:
        """Of the bins, one more than there are counts."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)
