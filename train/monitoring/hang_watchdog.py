"""A rank that hangs is named, all ranks write their stacks, and the job ends.

One daemon thread on every rank publishes a heartbeat and watches how long the main thread stays in
one section. It speaks long before the collectives' own timeout, which can say only that some rank
did not come. Whatever it touches may hang too (a log, a disk, the store), and none may delay it.
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
PATIENCE_SECONDS = 10.0
"""How long a log, a disk or a store that hangs too can delay the end, each."""
STDERR = 2


class Watchdog:
    """Ends the job where a rank stays in one section for too long; to be used in a `with`."""

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
        """Prepare to watch.

        Args:
            sections: What the main thread of this rank says it does.
            store: Shared by all ranks of this attempt; a connection that nobody else uses.
            folder: Where stacks are written, `hangs` in the run folder.
            rank: This rank.
            world_size: How many there are.
            timeout_seconds: How long one data, step, log or validate section may take.
            setup_timeout_seconds: The same for setup and checkpoint.
            record: Called with the verdict and the step, by the lowest rank that still can.
        """
        self._sections, self._folder, self._record, self._rank = sections, folder, record, rank
        self._board: HeartbeatStore | None = HeartbeatStore(store, rank, world_size)
        self._limits: dict[Section, float] = dict.fromkeys(SECTIONS, timeout_seconds)
        self._limits |= {"setup": setup_timeout_seconds, "checkpoint": setup_timeout_seconds}
        self._silences = HeartbeatAges()
        self._interval = min(5.0, timeout_seconds / 10, setup_timeout_seconds / 10)
        self._main = threading.main_thread().ident or 0
        self._beats, self._last_beat = 0, time.monotonic()
        self._awake_since = self._last_beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join(PATIENCE_SECONDS)

    def _watch(self) -> None:
        while not self._stopped.is_set():
            beat, verdict = self._beat()
            if verdict is None and self._is_late(beat):
                verdict = self._diagnose()
            if verdict is not None and not self._stopped.is_set():
                self._end(verdict)
            self._stopped.wait(self._interval)

    def _beat(self) -> tuple[Heartbeat, HangReport | None]:
        """Publish where the main thread is; also return what another rank has judged."""
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
        return beat, self._ask(lambda board: board.exchange(beat))

    def _is_late(self, beat: Heartbeat) -> bool:
        return beat.seconds > self._limits[beat.section]

    def _diagnose(self) -> HangReport | None:
        """Read all heartbeats twice, three beats apart, and agree on who hangs."""
        self._listen()
        for _ in range(3):
            self._stopped.wait(self._interval)
            beat, _ = self._beat()
        if self._stopped.is_set() or not self._is_late(beat):
            return None
        now, silences = self._listen()
        if now is None:
            return HangReport(
                f"rank {self._rank} is {beat}; the store of heartbeats does not answer, so it is "
                "unknown which rank it waits for"
            )
        found = diagnose_hang(now, silences, self._limits)
        return found and (self._ask(lambda board: board.agree(found)) or found)

    def _listen(self) -> tuple[list[Heartbeat | None] | None, list[float]]:
        """Read all heartbeats, and how long each rank has been silent."""
        now = self._ask(lambda board: board.heartbeats())
        return now, self._silences.listen(now) if now else []

    def _ask(self, question: Callable[[HeartbeatStore], T]) -> T | None:
        """Return the blackboard's answer; None once its store is gone, which is for good."""
        board = self._board
        if board is None:
            return None
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question(board))
            except RuntimeError as error:
                logger.debug("watchdog: %s", error)

        if not _within(PATIENCE_SECONDS, ask) or not answers:
            self._board = None
            return None
        return answers[0]

    def _end(self, verdict: HangReport) -> None:
        """Say who hangs, write this rank's stacks, and end the process once all have."""
        t = self._sections.current[1]
        path = self._folder / f"rank-{self._rank:05d}-step-{t:08d}.txt"
        running = (rank for rank in range(self._rank + 1) if rank not in verdict.silent)
        speaks = self._board is None or next(running, None) == self._rank

        def say() -> None:
            if speaks:
                logger.error("hang: %s; stacks are in %s", verdict.text, self._folder)
            else:
                logger.warning("hang: ended, stacks are in %s", path)

        _within(PATIENCE_SECONDS, say)
        if not _within(PATIENCE_SECONDS, lambda: _write_stacks(path, verdict.text)):
            _within(PATIENCE_SECONDS, lambda: faulthandler.dump_traceback(STDERR))
        if speaks:
            _within(PATIENCE_SECONDS, lambda: self._record(verdict.text, t))
        silent = len(verdict.silent)
        self._ask(lambda board: board.wait_for_stacks(silent, PATIENCE_SECONDS / 2))
        os._exit(HUNG_EXIT_STATUS)  # the main thread cannot be asked to


def _write_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads, to stderr if there is no room on the disk."""
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
    """Run `action`, which may never return, on a thread of its own; say whether it has."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
