"""Check the run folder before step 1: its name, that all ranks share it, its free space."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.urls import Location, Url
from train.parallel.runtime import Runtime

SPARE = 1.2
"""Free space required, in multiples of the bytes to be written."""
SHARED_WITHIN_SECONDS = 10.0
"""How long a file may take to appear on another host; NFS caches its absence for seconds."""


def name_problems(name: str) -> list[str]:
    """Return a line if a run cannot have this name, which becomes part of paths and URLs."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name):
        return []
    return [
        f"name: {name!r}, must be up to 200 of the characters A-Z a-z 0-9 . _ - and not begin "
        "with . or -"
    ]


def check_run_folder(
    run_dir: Path, output_dir: Path, *, needed_bytes: int, runtime: Runtime
) -> tuple[Path, ...]:
    """Make the run folder, and check that every rank can write it and that all ranks share it.

    Every rank calls this. It removes its own files, and on an error the folders it has made.

    Args:
        run_dir: The run folder.
        output_dir: The folder it must lie in, also after links are resolved.
        needed_bytes: Bytes that the run will write.
        runtime: This rank.

    Returns:
        The folders that rank 0 has made, the run folder first; on the other ranks none.

    Raises:
        ValueError: On rank 0, if a check fails.
    """
    made = _missing(run_dir) if runtime.is_main else ()
    token = runtime.gather(uuid.uuid4().hex)[0]
    probes = [run_dir / f".probe-{token}-{rank}" for rank in range(runtime.world_size)]
    try:
        runtime.main_first(lambda: _make(run_dir, output_dir, runtime))
        runtime.on_every_rank(lambda: _write(probes[runtime.rank]))
        seen = probes if runtime.is_main else probes[:1]
        runtime.on_every_rank(lambda: _wait_for(seen))
        check_space(run_dir, needed_bytes, runtime)
    except (ValueError, SystemExit):
        remove_made(made)
        raise
    finally:
        with suppress(OSError):  # it may never have been written
            probes[runtime.rank].unlink()
    return made


def check_checkpoint_folder(folder: Location, needed_bytes: int, runtime: Runtime) -> None:
    """Check that every rank can write the folder of the checkpoints, and that all ranks share it.

    Every rank calls this.

    Args:
        folder: The folder, which is made if it is a path.
        needed_bytes: Bytes of one checkpoint, for which a file system must have space.
        runtime: This rank.

    Raises:
        ValueError: On rank 0, if a check fails.
    """
    token = runtime.gather(uuid.uuid4().hex)[0]
    probes = [folder / f".probe-{token}-{rank}" for rank in range(runtime.world_size)]
    own = probes[runtime.rank]

    def write() -> None:
        if isinstance(own, Url):
            own.write_bytes(own.name.encode())
            return
        with suppress(OSError):  # found by the write
            own.parent.mkdir(parents=True, exist_ok=True)
        _write(own, "checkpoint.folder")

    def remove() -> None:
        own.remove() if isinstance(own, Url) else own.unlink(missing_ok=True)

    try:
        runtime.on_every_rank(write)
        seen = probes if runtime.is_main else probes[:1]
        runtime.on_every_rank(lambda: _wait_for(seen, "checkpoint.folder"))
        runtime.on_every_rank(lambda: None)  # all have seen them
    except (ValueError, SystemExit):
        with suppress(OSError):
            remove()
        raise
    runtime.on_every_rank(remove)
    if not isinstance(folder, Url):
        check_space(folder, needed_bytes, runtime)


def remove_made(folders: tuple[Path, ...]) -> None:
    """Remove the folders that a refused run has made: the run folder, then what is empty above."""
    for i, folder in enumerate(folders):
        if i:
            with suppress(OSError):  # in use by another run
                folder.rmdir()
        elif not any((folder / "checkpoints").glob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)


def _missing(run_dir: Path) -> tuple[Path, ...]:
    try:
        return tuple(path for path in (run_dir, *run_dir.parents) if not path.exists())
    except (OSError, RuntimeError):  # found again, with a message, when it is made
        return ()


def refuse_early(run_dir: Path, output_dir: Path) -> None:
    """Refuse a run folder that cannot be made or written, without making it.

    Raises:
        ValueError: If it cannot.
    """
    _refuse_outside(run_dir, output_dir)
    there = run_dir
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"output_dir: {there} is no folder, choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: {there} cannot be written, choose a folder you may write")


def check_space(folder: Path, needed_bytes: int, runtime: Runtime) -> None:
    """Check that there is space for these bytes and a reserve; every rank calls this.

    Raises:
        ValueError: On rank 0, if there is less on any host.
    """

    def check() -> None:
        needed, free = SPARE * needed_bytes, shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"output_dir: {folder} needs {_gib(needed)}, {_gib(free)} free, delete old "
                "runs, keep fewer checkpoints or choose another folder"
            )

    runtime.on_every_rank(check)


def _make(run_dir: Path, output_dir: Path, runtime: Runtime) -> None:
    try:
        _refuse_outside(run_dir, output_dir)
        if runtime.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
        elif not run_dir.is_dir():
            raise ValueError(
                f"output_dir: {run_dir} was made by rank 0 but is not there, choose a folder that "
                "all hosts share"
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"output_dir: {run_dir} cannot be made, {error}, choose a folder you may write"
        ) from error


def _refuse_outside(run_dir: Path, output_dir: Path) -> None:
    real, outputs = run_dir.resolve(), output_dir.resolve()
    if outputs not in real.parents:
        raise ValueError(
            f"name: {run_dir} leads to {real}, outside of {outputs}, remove the link or "
            "choose another --name"
        )


def _write(probe: Path, field: str = "output_dir") -> None:
    """Write a file and sync it to the disk."""
    try:
        with probe.open("x") as file:
            file.write(probe.name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{field}: {probe.parent} cannot be written, {error}, choose a folder you may write"
        ) from error


def _wait_for(probes: Sequence[Location], field: str = "output_dir") -> None:
    """Read the files that other ranks have written."""
    deadline = time.monotonic() + SHARED_WITHIN_SECONDS
    for probe in probes:
        while not _is_whole(probe):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{field}: {probe.parent} is not the same folder on all hosts, the file of "
                    f"rank {probe.name.rpartition('-')[2]} is missing, choose a folder that all "
                    "hosts share"
                )
            time.sleep(0.1)


def _is_whole(probe: Location) -> bool:
    try:
        return probe.read_bytes() == probe.name.encode()
    except OSError:
        return False


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
