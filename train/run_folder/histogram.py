"""Counts of numbers in bins of equal width, as sinks of metrics take them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins of equal width."""

    counts: list[int]
    low: float
    """Lower edge of the first bin, which includes all numbers below."""
    high: float
    """Upper edge of the last bin, which includes all numbers above."""
