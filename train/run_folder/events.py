"""The events of a run over all its starts, events.jsonl, and its present status, status.json.

For people and job scripts, and for events later than the newest checkpoint.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.foreign_json import parse_object, take
from train.run_folder.writing import append, attempt, replace_file

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
        if writes:
            attempt(path, lambda: _cut_torn_line(path))

    def append(self, kind: str, step: int, **fields: Any) -> None:
        """Append an event after `step` steps, synced to the disk.

        On a full disk the line is lost, with a warning.
        """
        attempt(self._path, lambda: self.append_required(kind, step, **fields))

    def append_required(self, kind: str, step: int, **fields: Any) -> None:
        """Append an event that a restarted run depends on.

        Raises:
            OSError: If it was not written.
        """
        if self._writes:
            append_event(self._path, kind, step, **fields)

    def read(self) -> list[Event]:
        """Return all events so far, oldest first; damaged lines are skipped with a warning."""
        lines: list[bytes] = []
        if self._path.is_file():
            attempt(f"{self._path} (reading)", lambda: lines.extend(_lines(self._path)))
        events = []
        for line in lines:
            try:
                event = parse_object(line)
                take(event, "time", float)
                take(event, "kind", str)
                take(event, "step", int)
            except ValueError:
                logger.warning("events: skipped a damaged line of %s: %.60r", self._path, line)
            else:
                events.append(event)
        return events


def append_event(path: Path, kind: str, step: int, **fields: Any) -> None:
    """Append one event to the log at `path` atomically; for any thread of any rank.

    Raises:
        OSError: If it was not written.
    """
    event = {"time": time.time(), "kind": kind, "step": step, **fields}
    append(path, (json.dumps(event) + "\n").encode(), sync=True)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
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
    content = (json.dumps(status) + "\n").encode()
    for path in paths:
        attempt(path, partial(replace_file, path, content))
