"""Name the rank that hangs, write the stacks of all ranks, and end the job.

One daemon thread on every rank publishes a heartbeat and measures how long the main thread stays in
one section. Its limit lies far below the collectives' own timeout, whose message names no rank.
Whatever it calls may hang too (a log, a disk, the store); each such call has a time limit.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from train.monitoring.heartbeat import (
    HangReport,
    Heartbeat,
    HeartbeatAges,
    HeartbeatStore,
    diagnose_hang,
)
from train.monitoring.main_thread import waits
from train.monitoring.sections import SECTIONS, Section, Sections

T = TypeVar("T")
logger = logging.getLogger(__name__)

HUNG_EXIT_STATUS = 124
"""Exit status of every rank of a job that hung, as of timeout(1)."""
CALL_TIMEOUT_SECONDS = 10.0
"""How long a log, a disk or a store that hangs too can delay the end, each."""
STDERR = 2


class Watchdog:
    """Ends the job where a rank stays in one section for too long, within a `with` block."""

    def __init__(
        self,
        sections: Sections,
        store: Store,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        setup_timeout_seconds: float,
        record: Callable[[str, int], None],
    ) -> None:
        """Set the limits; the thread starts with the `with` block.

        Args:
            sections: The sections of this rank's main thread.
            store: Shared by all ranks of this attempt; a connection that no other thread uses.
            folder: Where stacks are written, `hangs` in the run folder.
            rank: This rank.
            world_size: Number of ranks.
            timeout_seconds: How long one section may take, but for the next two.
            setup_timeout_seconds: The same for setup and checkpoint.
            record: Called with the hang report's text and the step, by the lowest rank that runs.
        """
        self._sections, self._folder, self._record, self._rank = sections, folder, record, rank
        self._store: HeartbeatStore | None = HeartbeatStore(store, rank, world_size)
        self._limits: dict[Section, float] = dict.fromkeys(SECTIONS, timeout_seconds)
        self._limits |= {"setup": setup_timeout_seconds, "checkpoint": setup_timeout_seconds}
        self._ages = HeartbeatAges()
        self._interval = min(5.0, timeout_seconds / 10, setup_timeout_seconds / 10)
        self._main = threading.main_thread().ident or 0
        self._beats, self._last_beat = 0, time.monotonic()
        self._awake_since = self._last_beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(CALL_TIMEOUT_SECONDS)

    def _run(self) -> None:
        while not self._stopped.is_set():
            beat, report = self._beat()
            if report is None and self._is_late(beat):
                report = self._diagnose()
            if report is not None and not self._stopped.is_set():
                self._end(report)
            self._stopped.wait(self._interval)

    def _beat(self) -> tuple[Heartbeat, HangReport | None]:
        """Publish a heartbeat; return it, and the hang report if a rank has published one."""
        section, t, seconds = self._sections.current
        now = time.monotonic()
        if now - self._last_beat > 5 * self._interval:
            self._awake_since = now  # the whole process slept, so the section counts anew
        self._beats, self._last_beat = self._beats + 1, now
        frame = sys._current_frames().get(self._main)
        beat = Heartbeat(
            self._beats,
            section,
            t,
            min(seconds, now - self._awake_since),
            waits=frame is not None and waits(frame),
        )
        return beat, self._call(lambda store: store.exchange(beat))

    def _is_late(self, beat: Heartbeat) -> bool:
        return beat.seconds > self._limits[beat.section]

    def _diagnose(self) -> HangReport | None:
        """Read all heartbeats twice, three beats apart; return the report all ranks agree on."""
        self._read_heartbeats()
        for _ in range(3):
            self._stopped.wait(self._interval)
            beat, _ = self._beat()
        if self._stopped.is_set() or not self._is_late(beat):
            return None
        last, ages = self._read_heartbeats()
        if last is None:
            return HangReport(
                f"rank {self._rank} is {beat}; the store of heartbeats does not answer, so it is "
                "unknown which rank it waits for"
            )
        found = diagnose_hang(last, ages, self._limits)
        return found and (self._call(lambda store: store.publish(found)) or found)

    def _read_heartbeats(self) -> tuple[list[Heartbeat | None] | None, list[float]]:
        """Return the last heartbeat of every rank and their ages; None without a store."""
        last = self._call(lambda store: store.heartbeats())
        return last, self._ages.update(last) if last else []

    def _call(self, method: Callable[[HeartbeatStore], T]) -> T | None:
        """Return what a method of the store returns; None once the store has failed, for good."""
        store = self._store
        if store is None:
            return None
        results: list[T] = []

        def call() -> None:
            try:
                results.append(method(store))
            except RuntimeError as error:
                logger.debug("watchdog: %s", error)

        if not _within(CALL_TIMEOUT_SECONDS, call) or not results:
            self._store = None
            return None
        return results[0]

    def _end(self, report: HangReport) -> None:
        """Log the report, write this rank's stacks, and end the process once all ranks have."""
        t = self._sections.current[1]
        path = self._folder / f"rank-{self._rank:05d}-step-{t:08d}.txt"
        running = (rank for rank in range(self._rank + 1) if rank not in report.silent)
        is_lowest = self._store is None or next(running, None) == self._rank

        def log() -> None:
            if is_lowest:
                logger.error("hang: %s; stacks are in %s", report.text, self._folder)
            else:
                logger.warning("hang: ended, stacks are in %s", path)

        _within(CALL_TIMEOUT_SECONDS, log)
        if not _within(CALL_TIMEOUT_SECONDS, lambda: _write_stacks(path, report.text)):
            _within(CALL_TIMEOUT_SECONDS, lambda: faulthandler.dump_traceback(STDERR))
        if is_lowest:
            _within(CALL_TIMEOUT_SECONDS, lambda: self._record(report.text, t))
        num_silent = len(report.silent)
        self._call(lambda store: store.wait_for_stacks(num_silent, CALL_TIMEOUT_SECONDS / 2))
        os._exit(HUNG_EXIT_STATUS)  # the main thread may never return from its call


def _write_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads to `path`, or to stderr where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"{title}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
    except OSError as error:
        logger.error("hang: stacks are here, %s: %s", path, error)
        faulthandler.dump_traceback(STDERR)


def _within(seconds: float, action: Callable[[], None]) -> bool:
    """Run `action`, which may hang, on a thread of its own; return whether it has returned."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
