"""Lock a run folder, so that one job at a time writes it.

The lock is `run.lock.N` in the run folder. N counts takeovers: a job that finds a dead job's
run.lock.4 creates run.lock.5, in which the file system lets one job alone succeed, and only then
deletes the old one. No lock is renamed or deleted before its successor exists, so at no time do two
jobs both hold the run.
"""

import json
import logging
import os
import random
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 10.0
"""Interval of the holder's heartbeat, which is the lock file's modification time."""
DEAD_AFTER_SECONDS = 60.0
"""A holder on another host counts as dead after this long without a heartbeat."""
DECIDED_WITHIN_SECONDS = 20.0
"""A job that creates a lock beside another has deleted one of the two after this long."""


class RunHeldError(ValueError):
    """A living job holds the run."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str
    """Start time of that process in the kernel's clock ticks; empty where it is hidden."""
    namespace: str
    """Namespace in which the pid is unique: containers on one host have their own."""
    job: str
    """Name of the job across restarts; empty without one."""
    time: float
    """Time of the lock in unix seconds."""
    token: str
    """Unique to this lock."""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


class RunLock:
    """The lock file of rank 0; on the other ranks it is empty and never lost."""

    def __init__(self, path: Path | None = None, token: str = "") -> None:
        """Hold the lock file that `acquire` has created."""
        self._path, self._token = path, token
        self._lost = ""

    @property
    def lost(self) -> str:
        """How another job has taken the run over, which must stop this one; empty: none has."""
        return self._lost

    def check(self) -> None:
        """Raise a ValueError if the run is no longer ours; for before a write."""
        self.refresh()
        if self._lost:
            raise ValueError(self._lost)

    def refresh(self) -> None:
        """Update the heartbeat, or find that the lock is lost."""
        if self._path is None or self._lost:
            return
        number, decided_at = _number(self._path), time.monotonic() + DECIDED_WITHIN_SECONDS
        try:
            while True:
                locks = _locks(self._path.parent)
                own, _ = locks.get(number, (None, 0.0))
                ours = own is not None and own.token == self._token
                if ours and max(locks) == number:
                    os.utime(self._path)
                    return
                if not ours or time.monotonic() > decided_at:
                    break
                # A job that went by locks released since withdraws; another deletes ours.
                time.sleep(0.01)
        except OSError as error:
            logger.warning("lock: the heartbeat could not be written: %s", error)
            return
        taker = locks[max(locks)][0] if locks else None
        self._lost = (
            f"name: {self._path} was taken over by {taker or 'another job'}, as if this job were "
            "dead; it stops, so that no two jobs write one run"
        )

    def release(self) -> None:
        """Delete the lock if it is still ours."""
        self.refresh()
        if self._path is not None and not self._lost:
            with suppress(OSError):  # the lock is stale once this process has ended
                self._path.unlink()


@contextmanager
def lock_run(folder: Path, runtime: Runtime) -> Iterator[RunLock]:
    """Hold the run folder, which must exist, for this job; every rank calls this.

    Raises:
        ValueError: On rank 0, if another job holds it.
    """

    def take() -> RunLock:
        try:
            return acquire(folder, runtime.job) if runtime.is_main else RunLock()
        except OSError as error:
            raise ValueError(f"name: {folder} cannot be locked, {error}") from error

    lock = runtime.on_every_rank(take)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(REFRESH_SECONDS):
            lock.refresh()

    thread = threading.Thread(target=keep, name="run lock", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join(REFRESH_SECONDS)
        lock.release()


def acquire(folder: Path, job: str) -> RunLock:
    """Take the lock, also over from a dead job.

    Args:
        folder: The run folder.
        job: Name of this job across restarts; empty without one.

    Raises:
        RunHeldError: If a living job holds it.
    """
    for _ in range(100):
        found = _locks(folder)
        now = _file_system_time(folder) if found else 0.0
        stale = {
            number: _why_stale(folder, holder, now - changed, job)
            for number, (holder, changed) in found.items()
        }
        path, me = _path(folder, max(found, default=0) + 1), _this_process(job)
        if _create(path, me):
            # A slower job may have read the earlier locks; then one of the two must withdraw.
            others = {number: holder for number, (holder, _) in _locks(folder).items()}
            unchanged = others.pop(_number(path), None) == me and all(
                number in found and found[number][0] == others[number] for number in others
            )
            if unchanged:
                for number, reason in stale.items():
                    logger.warning("lock: recovered %s, %s", _path(folder, number), reason)
                    _path(folder, number).unlink(missing_ok=True)
                return RunLock(path, me.token)
            path.unlink(missing_ok=True)
        time.sleep(random.uniform(0.001, 0.02))
    raise ValueError(f"name: other jobs keep taking {folder}, start one at a time")


def refuse_held(folder: Path, job: str) -> None:
    """Raise a RunHeldError if a living job other than `job` holds the run folder, if there is one.

    Takes and changes nothing, so the answer may be old a moment later.
    """
    for holder, changed in _locks(folder).values():
        _why_stale(folder, holder, _file_system_time(folder) - changed, job)


def _locks(folder: Path) -> dict[int, tuple[Holder | None, float]]:
    """Return the holder and the last heartbeat of each lock, by its N.

    A lock that is half written has no holder.
    """
    found: dict[int, tuple[Holder | None, float]] = {}
    for path in folder.glob("run.lock.[0-9]*"):
        try:
            # On NFS, an opened file has its true times.
            with path.open() as file:
                changed = os.fstat(file.fileno()).st_mtime
                text = file.read()
        except FileNotFoundError:
            continue
        try:
            holder: Holder | None = Holder(**json.loads(text))
        except (ValueError, TypeError):
            holder = None
        found[_number(path)] = (holder, changed)
    return found


def _path(folder: Path, number: int) -> Path:
    return folder / f"run.lock.{number}"


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _why_stale(folder: Path, holder: Holder | None, age: float, job: str) -> str:
    """Return why the holder of a lock is dead.

    Raises:
        RunHeldError: If it is alive.
    """
    silence = f"no heartbeat for {age:.0f} s"
    if holder is None:
        if age > DEAD_AFTER_SECONDS:
            return f"half written, {silence}"
    elif (holder.host, holder.namespace) == (socket.gethostname(), _namespace()):
        if not _is_alive(holder):
            return f"{holder} is gone"
    elif job and holder.job == job:
        return f"{holder} was this job ({job}) before it was restarted"
    elif age > DEAD_AFTER_SECONDS:
        return f"{holder}: {silence}"
    raise RunHeldError(
        f"name: {folder} is being written by {holder or 'a job that has just started'}, last "
        f"heartbeat {max(age, 0):.0f} s ago, stop that job or choose another --name; a job on "
        f"another host counts as dead after {DEAD_AFTER_SECONDS:.0f} s without one"
    )


def _create(path: Path, holder: Holder) -> bool:
    """Create the lock file; return whether it did not exist."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(holder)) + "\n")
        file.flush()
        os.fsync(descriptor)
    return True


def _file_system_time(folder: Path) -> float:
    """Return the time by the file system's clock, which may be a server's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def _this_process(job: str) -> Holder:
    pid = os.getpid()
    started = _state(pid)[1]
    host, token = socket.gethostname(), uuid.uuid4().hex
    return Holder(host, pid, started, _namespace(), job, time.time(), token)


def _is_alive(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    state, started = _state(holder.pid)
    return state not in ("Z", "X") and started in ("", holder.started)


def _state(pid: int) -> tuple[str, str]:
    """Return the letter of a process's state and its start time; empty where hidden."""
    try:
        # proc(5): the fields after the name in brackets, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
