"""Heartbeats of all ranks, and the verdict they allow: which rank hangs.

Knows nothing of threads, files and the process group; the watchdog asks it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from train.monitoring.sections import SECTIONS, Section


@dataclass(frozen=True)
class Heartbeat:
    """Where the main thread of a rank is; `count` grows as long as its other threads run."""

    count: int
    section: Section
    t: int
    seconds: float
    waits: bool = False
    """Whether it is inside a collective, where other ranks are to come."""

    def __str__(self) -> str:
        """Say where that is."""
        return f"in {self.section} of step {self.t} for {self.seconds:.0f} s"


@dataclass(frozen=True)
class HangReport:
    """Who hangs; `silent` ranks are too far gone to write their stacks."""

    text: str
    silent: tuple[int, ...] = ()


class HeartbeatAges:
    """How long each rank has not been heard of; remembers the heartbeats it is shown."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing heard; `clock` counts seconds."""
        self._clock = clock
        self._heard: dict[int, tuple[int, float]] = {}

    def listen(self, beats: list[Heartbeat | None]) -> list[float]:
        """Return the seconds since each rank was first seen at its count; 0 where that is new."""
        now = self._clock()
        counts = [beat.count if beat else -1 for beat in beats]
        for rank, count in enumerate(counts):
            if self._heard.get(rank, (None, now))[0] != count:
                self._heard[rank] = count, now
        return [now - self._heard[rank][1] for rank in range(len(beats))]


def diagnose_hang(
    now: list[Heartbeat | None],
    silences: list[float],
    limits: dict[Section, float],
) -> HangReport | None:
    """Say who hangs, from a reading of all heartbeats some beats after another.

    A rank without a new heartbeat is silent: stopped, on a dead machine, or in code that lets no
    other thread run. It has hung once the others wait for longer than the section it was last seen
    in may take, or its silence alone is as long as a step may take: it may have left that section
    since. Else it is the rank furthest behind, and of several at one place those that do not wait
    for others. Any may take the time its own section has, which can be more than that of the
    others.

    Args:
        now: The last heartbeat of each rank; None: never heard of.
        silences: Seconds since each rank was last heard of; 0: since the reading before.
        limits: Seconds that each section may take.
    """
    silent = tuple(rank for rank, seconds in enumerate(silences) if seconds)
    beats = [beat for rank, beat in enumerate(now) if beat is not None and rank not in silent]
    if silent:
        waited = max((beat.seconds for beat in beats), default=0.0)
        last = {rank: now[rank] for rank in silent}
        frozen = [
            rank
            for rank, beat in last.items()
            if waited > limits[beat.section if beat else "setup"] or silences[rank] > limits["step"]
        ]
        if not frozen:
            return None
        seen = f"last seen {last[frozen[0]]}" if last[frozen[0]] else "never seen"
        return HangReport(f"{_name(frozen)} frozen, without a heartbeat, {seen}", silent)
    behind = min(map(_position, beats))
    hung = [rank for rank, beat in enumerate(beats) if _position(beat) == behind]
    at_work = [rank for rank in hung if not beats[rank].waits]
    hung = at_work or hung
    latest = min((beats[rank] for rank in hung), key=lambda beat: beat.seconds)
    if latest.seconds <= limits[latest.section]:
        return None
    if len(hung) == len(beats) > 1:
        return HangReport(f"all {len(beats)} ranks are {latest}, each waiting for another")
    ahead = sorted(position for position in map(_position, beats) if position != behind)
    waiting = "; the others wait for it" if len(hung) < len(beats) else ""
    if ahead:
        waiting = f"; the others are in {SECTIONS[ahead[0][1]]} of step {ahead[0][0]}"
    return HangReport(f"{_name(hung)} {latest}{waiting}")


def _position(beat: Heartbeat) -> tuple[int, int]:
    """Order heartbeats by how far the rank has come."""
    return beat.t, SECTIONS.index(beat.section)


def _name(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown} is" if len(ranks) == 1 else f"ranks {shown}{more} are"


class HeartbeatStore:
    """What the watchdogs of all ranks tell each other; a RuntimeError where its store is gone."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Use `store`, whose keys no earlier attempt of the job has written."""
        self._store = store
        self._own = f"watchdog/{rank}"
        self._all = [f"watchdog/{other}" for other in range(world_size)]

    def exchange(self, beat: Heartbeat) -> HangReport | None:
        """Publish a heartbeat; return the verdict, if there is one."""
        self._store.set(self._own, json.dumps(asdict(beat)))
        if not self._store.check(["watchdog/verdict"]):
            return None
        return _parse(self._store.get("watchdog/verdict"))

    def heartbeats(self) -> list[Heartbeat | None]:
        """Return the last heartbeat of every rank."""
        present = self._all
        if not self._store.check(self._all):  # to ask for one that is not there would wait
            present = [key for key in self._all if self._store.check([key])]
        read = dict(zip(present, self._store.multi_get(present), strict=True))
        return [Heartbeat(**json.loads(read[key])) if key in read else None for key in self._all]

    def agree(self, verdict: HangReport) -> HangReport:
        """Write the verdict unless another rank has; return the one that stands."""
        return _parse(self._store.compare_set("watchdog/verdict", "", json.dumps(asdict(verdict))))

    def wait_for_stacks(self, silent: int, seconds: float) -> None:
        """Say that this rank's stacks are written; wait until all but the silent ranks say so."""
        deadline = time.monotonic() + seconds
        written = self._store.add("watchdog/written", 1)
        while written < len(self._all) - silent and time.monotonic() < deadline:
            time.sleep(0.05)
            written = self._store.add("watchdog/written", 0)


def _parse(text: bytes) -> HangReport:
    fields = json.loads(text)
    return HangReport(fields["text"], tuple(fields["silent"]))
