"""The events of a run over all its starts, events.jsonl, and its present status, status.json.

For people and job scripts, and for events later than the newest checkpoint.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Event = dict[str, Any]
"""One line of the log: "time" in unix seconds, "kind", "step", and the fields of the kind."""
State = Literal["running", "preempted", "finished", "interrupted", "failed"]
"""interrupted: by what a restart may cure; failed: by what it would meet again."""


class EventLog:
    """The events of a run, which one rank writes; on the others every call is a no-op."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Open the log; a last line that a kill has torn is cut off.

        Args:
            path: events.jsonl in the run folder.
            writes: Whether this is the rank that writes, rank 0.
        """
        self._path, self._writes = path, writes
        if writes and path.exists():
            _cut_torn_line(path)

    def append(self, kind: str, step: int, **fields: Any) -> None:
        """Append an event after `step` steps, synced to the disk.

        On a full disk the line is lost, with a warning.
        """
        try:
            self.append_required(kind, step, **fields)
        except OSError as error:
            logger.warning("events: %s of step %d is lost in %s: %s", kind, step, self._path, error)

    def append_required(self, kind: str, step: int, **fields: Any) -> None:
        """Append an event that a restarted run depends on.

        Raises:
            OSError: If it was not written.
        """
        if self._writes:
            append_event(self._path, kind, step, **fields)

    def read(self) -> list[Event]:
        """Return all events so far, oldest first; damaged lines are skipped with a warning."""
        events = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and event.keys() >= {"time", "kind", "step"}:
                events.append(event)
            else:
                logger.warning("events: skipped a damaged line of %s: %.60r", self._path, line)
        return events


def append_event(path: Path, kind: str, step: int, **fields: Any) -> None:
    """Append one event to the log at `path` atomically; for any thread of any rank.

    Raises:
        OSError: If it was not written.
    """
    event = {"time": time.time(), "kind": kind, "step": step, **fields}
    line = (json.dumps(event) + "\n").encode()
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_torn_line(path: Path) -> None:
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        logger.warning("events: cut a torn last line off %s: %.60r", path, torn)
        os.truncate(path, len(whole) + 1 if whole else 0)


def starts(events: Sequence[Event]) -> int:
    """Return how often the run was started, the first start included."""
    return sum(event["kind"] == "start" for event in events)


def first_start(events: Sequence[Event]) -> float | None:
    """Return the time of the first start, in unix seconds."""
    return next((event["time"] for event in events if event["kind"] == "start"), None)


def goodput(productive_seconds: float, events: Sequence[Event], now: float) -> float:
    """Return the share of the time since the first start that was productive, in [0, 1].

    Args:
        productive_seconds: Time of all steps that no restart or rollback has undone.
        events: Of the whole run.
        now: The time in unix seconds.
    """
    began = first_start(events)
    if began is None or now <= began:
        return 0.0
    return min(1.0, productive_seconds / (now - began))


def write_status(
    paths: Sequence[Path], state: State, step: int, reason: str = "", *, saved: int = 0
) -> None:
    """Write the status of the run, each file atomically.

    On a full disk the file is not written, with a warning.

    Args:
        paths: The run folder's status.json, and the job script's copy.
        state: The state of the run.
        step: Steps done.
        reason: Why it ended, in words.
        saved: Steps of the newest checkpoint.
    """
    status = {"state": state, "step": step, "saved": saved, "time": time.time(), "reason": reason}
    for path in paths:
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("w") as file:
                file.write(json.dumps(status) + "\n")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            logger.warning("status: %s is not in %s: %s", state, path, error)
