"""What a rank is doing, and for how long it has done what.

The main thread says what it begins; the watchdog and the straggler report read it. Knows nothing
of ranks and files. Its clock does not jump when the machine's does.
"""

import time
from collections.abc import Callable
from typing import Literal, get_args

Section = Literal["setup", "data", "step", "log", "validate", "checkpoint"]
SECTIONS: tuple[Section, ...] = get_args(Section)
"""All sections, in the order in which a step goes through them."""


class Sections:
    """What this rank is doing, and for how long it has done what."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin in "setup"; `clock` counts seconds."""
        self._clock = clock
        self._spent = dict.fromkeys(SECTIONS, 0.0)
        self._counted_from = clock()
        # One tuple, so that another thread never reads a name with the time of another.
        self._entered: tuple[Section, int, float] = ("setup", 0, self._counted_from)

    def enter(self, name: Section, t: int) -> None:
        """Begin a section of step t, counted from 0; the one before ends. Main thread only."""
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
