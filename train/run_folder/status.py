"""The status of a run: state, steps done and steps saved, for people and job scripts.

Rank 0 writes it. A failure that is final is written by whichever rank meets it: rank 0 may see
no more of it than a connection that closes, and does not overwrite it with that.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.urls import Location
from models.checkpoint_format import checkpoint_steps
from train.monitoring.interruption import StopRequestError
from train.monitoring.sections import Sections
from train.parallel.runtime import Runtime
from train.run_folder.events import State, append_event, write_status
from train.run_folder.failures import AGREED, is_final
from train.run_folder.preflight import remove_made
from train.run_folder.run_lock import RunLock


class RunStatus:
    """Writes status.json in the run folder, and the job script's copy of it."""

    def __init__(
        self, run_dir: Path, checkpoints: Location, status_file: str, runtime: Runtime
    ) -> None:
        """Write the copy alone, until the run folder is held."""
        self._checkpoints, self._saved = checkpoints, 0
        self._run_dir, self._is_main = run_dir, runtime.is_main
        self._copies = [Path(status_file)] if status_file else []
        self._lock: RunLock | None = None
        self._made: tuple[Path, ...] = ()

    def hold(self, lock: RunLock, made: tuple[Path, ...] = ()) -> None:
        """Write to the run folder too, as long as this lock is not lost.

        Args:
            lock: The lock of the run folder.
            made: Folders made for this run, removed if it is refused before its first step.
        """
        self._lock, self._made = lock, made
        if self._is_main:
            self.write("running", self.saved)

    @property
    def saved(self) -> int:
        """Steps of the newest checkpoint; a restart goes on from there.

        Of a folder by URL, as last noted: a store that is away must not hold up the run.
        """
        if isinstance(self._checkpoints, Path):
            self._saved = max(checkpoint_steps(self._checkpoints), default=0)
        return self._saved

    def note_saved(self, step: int) -> None:
        """Take the step of the newest checkpoint as of now."""
        self._saved = step

    def write(self, state: State, step: int, reason: str = "") -> None:
        """Write the status; on the other ranks this is a no-op.

        Args:
            state: The state of the run.
            step: Steps done.
            reason: Why it ended, in words.
        """
        if self._is_main:
            write_status(self._paths, state, step, reason, saved=self.saved)

    @contextmanager
    def record_end(self, sections: Sections) -> Iterator[None]:
        """Record that the `with` block was stopped before its first step or failed, and why."""
        try:
            yield
        except StopRequestError as stop:
            self._event("preempted", self.saved, str(stop))
            self.write("preempted", self.saved, str(stop))
            raise
        except Exception as error:
            section, t, _ = sections.current
            self._record(error, t)
            refused = section == "setup" and isinstance(error, ValueError | OSError)
            if refused and is_final(error) and self._holds:
                remove_made(self._made)
            raise

    def _record(self, error: Exception, t: int) -> None:
        final, reason = is_final(error), f"{type(error).__name__}: {error}"
        reports = self._is_main or (final and not isinstance(error, AGREED))
        if reports and not self._failed:
            state: State = "failed" if final else "interrupted"
            self._event(state, t, reason)
            write_status(self._paths, state, t, reason, saved=self.saved)

    @property
    def _failed(self) -> bool:
        """Whether a rank of this attempt has recorded that the run has failed for good."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            path = self._paths[0]
            return bool(json.loads(path.read_text())["state"] == "failed") and self._holds
        return False

    @property
    def _holds(self) -> bool:
        return self._lock is not None and not self._lock.lost

    @property
    def _paths(self) -> list[Path]:
        own = [self._run_dir / "status.json"] if self._holds else []
        return [*own, *self._copies]

    def _event(self, kind: str, step: int, reason: str) -> None:
        if self._holds and (self._is_main or kind == "failed"):
            with suppress(OSError):
                append_event(self._run_dir / "events.jsonl", kind, step, reason=reason)
