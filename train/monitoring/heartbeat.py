"""Heartbeats of all ranks, and the diagnosis they allow: which rank hangs.

Independent of threads, files and the process group, which are the watchdog's.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from train.monitoring.sections import SECTIONS, Section

REPORT_KEY = "watchdog/report"
STACKS_KEY = "watchdog/stacks"


@dataclass(frozen=True)
class Heartbeat:
    """What the main thread of a rank runs; `count` grows as long as its watchdog runs."""

    count: int
    section: Section
    t: int
    seconds: float
    """Time in this section."""
    waits: bool = False
    """Whether it waits for other ranks, see `main_thread.waits`."""

    def __str__(self) -> str:
        return f"in {self.section} of step {self.t} for {self.seconds:.0f} s"


@dataclass(frozen=True)
class HangReport:
    """Which ranks hang."""

    text: str
    silent: tuple[int, ...] = ()
    """Ranks without a new heartbeat, which cannot write their stacks."""


class HeartbeatAges:
    """How old the last new heartbeat of each rank is, over several readings."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without any heartbeat; `clock` counts seconds."""
        self._clock = clock
        self._last_new: dict[int, tuple[int, float]] = {}

    def update(self, beats: list[Heartbeat | None]) -> list[float]:
        """Return the seconds since each rank was first read at its count; 0 where it is new."""
        now = self._clock()
        counts = [beat.count if beat else -1 for beat in beats]
        for rank, count in enumerate(counts):
            if self._last_new.get(rank, (None, now))[0] != count:
                self._last_new[rank] = count, now
        return [now - self._last_new[rank][1] for rank in range(len(beats))]


def diagnose_hang(
    last: list[Heartbeat | None],
    ages: list[float],
    limits: dict[Section, float],
) -> HangReport | None:
    """Find the ranks that hang, from a reading of all heartbeats some beats after another.

    A rank without a new heartbeat is silent: stopped, on a dead machine, or in code that lets no
    other thread run. It is frozen once the others wait for longer than its last section may take,
    or once its silence alone exceeds the limit of a step: it may have left that section since.

    Where no rank is silent, the rank furthest behind hangs; of several in the same section of a
    step, those that do not wait. Each may take its own section's limit, which can exceed that
    of the others.

    Args:
        last: The last heartbeat of each rank; None: there was none.
        ages: Seconds since each rank's last new heartbeat; 0: since the reading before.
        limits: Seconds that each section may take.
    """
    silent = tuple(rank for rank, age in enumerate(ages) if age)
    beats = [beat for rank, beat in enumerate(last) if beat is not None and rank not in silent]
    if not silent:
        return _diagnose_hung(beats, limits)
    waited = max((beat.seconds for beat in beats), default=0.0)

    def is_frozen(rank: int) -> bool:
        beat = last[rank]
        return waited > limits[beat.section if beat else "setup"] or ages[rank] > limits["step"]

    frozen = [rank for rank in silent if is_frozen(rank)]
    if not frozen:
        return None
    seen = f"last seen {last[frozen[0]]}" if last[frozen[0]] else "never seen"
    return HangReport(f"{_name(frozen)} frozen, without a heartbeat, {seen}", silent)


def _diagnose_hung(beats: list[Heartbeat], limits: dict[Section, float]) -> HangReport | None:
    """Find the ranks that hang where all have new heartbeats."""
    furthest_behind = min(map(_progress, beats))
    hung = [rank for rank, beat in enumerate(beats) if _progress(beat) == furthest_behind]
    at_work = [rank for rank in hung if not beats[rank].waits]
    hung = at_work or hung
    latest = min((beats[rank] for rank in hung), key=lambda beat: beat.seconds)
    if latest.seconds <= limits[latest.section]:
        return None
    if len(hung) == len(beats) > 1:
        return HangReport(f"all {len(beats)} ranks are {latest}, each waiting for another")
    ahead = sorted(progress for progress in map(_progress, beats) if progress != furthest_behind)
    waiting = "; the others wait for it" if len(hung) < len(beats) else ""
    if ahead:
        waiting = f"; the others are in {SECTIONS[ahead[0][1]]} of step {ahead[0][0]}"
    return HangReport(f"{_name(hung)} {latest}{waiting}")


def _progress(beat: Heartbeat) -> tuple[int, int]:
    """Order heartbeats by how far the rank has come."""
    return beat.t, SECTIONS.index(beat.section)


def _name(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown} is" if len(ranks) == 1 else f"ranks {shown}{more} are"


class HeartbeatStore:
    """What the watchdogs of all ranks share; a RuntimeError where the store is gone."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Use `store`, whose keys no earlier attempt of the job has written."""
        self._store = store
        self._own = f"watchdog/{rank}"
        self._all = [f"watchdog/{other}" for other in range(world_size)]

    def exchange(self, beat: Heartbeat) -> HangReport | None:
        """Publish a heartbeat; return the hang report, if a rank has published one."""
        self._store.set(self._own, json.dumps(asdict(beat)))
        if not self._store.check([REPORT_KEY]):
            return None
        return _parse(self._store.get(REPORT_KEY))

    def heartbeats(self) -> list[Heartbeat | None]:
        """Return the last heartbeat of every rank."""
        present = self._all
        if not self._store.check(self._all):  # reading an absent key would block
            present = [key for key in self._all if self._store.check([key])]
        read = dict(zip(present, self._store.multi_get(present), strict=True))
        return [Heartbeat(**json.loads(read[key])) if key in read else None for key in self._all]

    def publish(self, report: HangReport) -> HangReport:
        """Publish a hang report unless a rank has already; return the one that is published."""
        return _parse(self._store.compare_set(REPORT_KEY, "", json.dumps(asdict(report))))

    def wait_for_stacks(self, num_silent: int, seconds: float) -> None:
        """Count this rank's stacks as written; wait for those of all but the silent ranks."""
        deadline = time.monotonic() + seconds
        written = self._store.add(STACKS_KEY, 1)
        while written < len(self._all) - num_silent and time.monotonic() < deadline:
            time.sleep(0.05)
            written = self._store.add(STACKS_KEY, 0)


def _parse(text: bytes) -> HangReport:
    fields = json.loads(text)
    return HangReport(fields["text"], tuple(fields["silent"]))
