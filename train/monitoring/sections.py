"""The sections of a training step, entered by the main thread, and the time spent in each.

The watchdog and the straggler report read them from threads of their own. The clock is monotonic:
it does not jump when the machine's is set.
"""

import time
from collections.abc import Callable
from typing import Literal, get_args

Section = Literal["setup", "data", "step", "log", "validate", "decode", "checkpoint"]
SECTIONS: tuple[Section, ...] = get_args(Section)
"""All sections, in the order in which a step goes through them."""


class Sections:
    """The section that this rank is in, and the seconds spent in each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Enter "setup"; `clock` counts seconds."""
        self._clock = clock
        self._spent = dict.fromkeys(SECTIONS, 0.0)
        self._counted_from = clock()
        # One tuple, so that no thread reads the name of one section with the time of another.
        self._entered: tuple[Section, int, float] = ("setup", 0, self._counted_from)

    def enter(self, name: Section, t: int) -> None:
        """End the present section and begin one of step t, counted from 0. Main thread only."""
        now = self._clock()
        self._count(now)
        self._entered = (name, t, now)

    def read(self) -> dict[Section, float]:
        """Return the seconds spent in each section since the last reading. Main thread only."""
        self._count(self._clock())
        spent, self._spent = self._spent, dict.fromkeys(SECTIONS, 0.0)
        return spent

    @property
    def current(self) -> tuple[Section, int, float]:
        """The section, its step t and the seconds since it began; for any thread."""
        name, t, since = self._entered
        return name, t, self._clock() - since

    def _count(self, now: float) -> None:
        self._spent[self._entered[0]] += now - self._counted_from
        self._counted_from = now
