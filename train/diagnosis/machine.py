"""Python, the memory, and the disk of the outputs, written, read and removed."""

import errno
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from train.diagnosis.findings import Finding, Level, one_line

NEWEST_PYTHON = (3, 13)
"""As the classifiers of setup.cfg."""
LEAST_MEMORY = 2 << 30
LEAST_DISK = 2 << 30
LEAST_SHARED_MEMORY = 1 << 30
WRITTEN = 64 << 20
"""Bytes written at most, to tell how fast the disk is."""
BLOCK = 4 << 20
WRITES_SECONDS = 4.0
"""When no more blocks are written."""
SLOW = 20 << 20
"""Bytes a second below which checkpoints hold training up."""
_REMEDIES = {
    errno.ENOSPC: "delete old runs, or choose another --output_dir",
    errno.EDQUOT: "delete old runs, or choose another --output_dir",
    errno.EIO: "the disk may be failing, choose another --output_dir",
}
_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_CONTROL = Path("/sys/fs/cgroup")


def check_python() -> Iterator[Finding]:
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.release()} {platform.machine()}"
    details = {"version": version, "system": platform.platform(), "cores": _cores()}
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        yield Finding(
            "python",
            Level.WARNING,
            f"{version} is newer than the tested {newest}",
            f"python{newest} -m venv .venv, where something fails",
            details,
        )
        return
    yield Finding("python", Level.OK, f"{found}, {_cores()} cores", details=details)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check_memory(gpus: int) -> Iterator[Finding]:
    """Check the memory that is free, and what NCCL shares of it between GPUs.

    Args:
        gpus: How many the machine has.
    """
    free, total = free_memory()
    found = f"{gib(free)} of {gib(total)} free"
    details: dict[str, object] = {"free_bytes": free, "total_bytes": total}
    if not total:
        yield Finding("memory", Level.OK, "not shown by this system")
    elif free < LEAST_MEMORY:
        remedy = "end other programs, or ask for more (sbatch --mem, docker run --memory)"
        yield Finding("memory", Level.WARNING, found, remedy, details)
    else:
        yield Finding("memory", Level.OK, found, details=details)
    shared = Path("/dev/shm")
    if gpus > 1 and shared.is_dir() and shutil.disk_usage(shared).free < LEAST_SHARED_MEMORY:
        yield Finding(
            "memory",
            Level.WARNING,
            f"/dev/shm has {gib(shutil.disk_usage(shared).free)} free, NCCL may need more",
            "docker run --ipc=host, or --shm-size 8g",
        )


def free_memory() -> tuple[int, int]:
    """Return the bytes of memory free and in all, of the machine or, if less, of its cgroup."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError, ValueError, IndexError):
        return 0, 0
    for line in groups:
        controller, path = line.split(":", 2)[1:]
        if controller in ("", "memory"):
            names = ("memory.max", "memory.current") if not controller else _FIRST_VERSION
            for folder in _above(_CONTROL / controller / path.lstrip("/")):
                with suppress(OSError, ValueError):  # not there, or "max"
                    limit, used = (int((folder / name).read_text()) for name in names)
                    if limit < total:
                        cached = _cached(folder / "memory.stat")
                        free, total = min(free, limit - used + cached), limit
    return max(free, 0), total


def _above(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.parents) if path.is_relative_to(_CONTROL)]


def _cached(stat: Path) -> int:
    """Return the bytes of files that a cgroup holds and would drop first."""
    lines = dict(line.split() for line in stat.read_text().splitlines())
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


def check_disk(folder: Path) -> Iterator[Finding]:
    """Write a file into a folder or, where that is not there yet, into the nearest above it."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield _disk_problem(f"{there} is no folder", "choose another --output_dir")
        return
    probe = there / f".doctor-{os.getpid()}-{time.time_ns():x}"
    try:
        free, block = shutil.disk_usage(there).free, os.urandom(BLOCK)
        written, writing = _write(probe, block)
        reading = _read(probe, written, block)
        probe.unlink()
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose an --output_dir that you may write")
        found = f"{there} cannot be used, {error.strerror or one_line(error)}"
        yield _disk_problem(found, remedy)
        return
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    yield _disk_found(folder, free, written / writing, written / reading)


def _disk_found(folder: Path, free: int, write: float, read: float) -> Finding:
    """Judge a disk by its free bytes and its bytes a second."""
    found = f"{folder}: {gib(free)} free, {write / 1e6:.0f} MB/s written and synced"
    details: dict[str, object] = {
        "free_bytes": free,
        "write_bytes_per_second": round(write),
        "read_bytes_per_second": round(read),
    }
    found += f", {read / 1e6:.0f} MB/s read"
    if free < LEAST_DISK:
        remedy = "delete old runs, or choose another --output_dir"
    elif write < SLOW:
        remedy = "slow checkpoints: a faster --output_dir, or a larger checkpoint.interval_steps"
    else:
        return Finding("disk", Level.OK, found, details=details)
    return Finding("disk", Level.WARNING, found, remedy, details)


def _disk_problem(found: str, remedy: str) -> Finding:
    return Finding("disk", Level.PROBLEM, found, remedy)


def _write(probe: Path, block: bytes) -> tuple[int, float]:
    """Write and sync blocks until there are enough or time is up; return bytes and seconds."""
    begun, written = time.perf_counter(), 0
    with probe.open("xb") as file:
        while written < WRITTEN and time.perf_counter() - begun < WRITES_SECONDS:
            written += file.write(block)
            file.flush()
            os.fsync(file.fileno())  # each, that a slow disk is noticed before the end
    return written, time.perf_counter() - begun


def _read(probe: Path, written: int, block: bytes) -> float:
    """Read a file, not from memory where the system can be asked to; return seconds.

    Raises:
        OSError: It is not what was written.
    """
    begun, count = time.perf_counter(), 0
    with probe.open("rb") as file:
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while (read := file.read(BLOCK)) == block:
            count += len(read)
    if read or count != written:
        raise OSError(errno.EIO, "other bytes are read than were written")
    return time.perf_counter() - begun


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
