"""The size of the global batch at every step, as a pure function of t."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRamp:
    """A batch that grows in equal increments over the first steps, or one of constant size."""

    size: int
    """Rows of the batch after the ramp."""
    start: int = 0
    """Rows of the batch of step 0; unused without steps."""
    increment: int = 1
    """Rows that each growth adds; divides size - start."""
    steps: int = 0
    """Steps until the batch has its full size, each size for equally many; 0: no ramp."""

    def at(self, t: int) -> int:
        """Return the rows of step t."""
        if t >= self.steps:
            return self.size
        return self.start + self.increment * (t * self._growths // self.steps)

    def before(self, t: int) -> int:
        """Return the rows of the steps before t, together."""
        if not self.steps:
            return t * self.size
        growths = (-(-k * self.steps // self._growths) for k in range(1, self._growths + 1))
        return t * self.start + self.increment * sum(max(t - first, 0) for first in growths)

    def steps_for(self, rows: int) -> int:
        """Return the least number of steps that read so many rows."""
        return bisect_left(range(rows + 1), rows, key=self.before)

    @property
    def _growths(self) -> int:
        return (self.size - self.start) // max(self.increment, 1)  # 0 is refused elsewhere
