"""What is checked of the run folder before step 1, so that no run finds it out hours later."""

import os
import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from train.parallel.runtime import Runtime

SPARE = 1.2
"""Free space asked for, in times of what is needed."""
SHARED_WITHIN_SECONDS = 10.0
"""How long a file may take to be seen on another host; NFS remembers for seconds what was not."""


def name_problems(name: str) -> list[str]:
    """Return a line if a run cannot have this name, which is a folder's, a plot's and a URL's."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name):
        return []
    return [
        f"name: {name!r}, must be up to 200 of the characters A-Z a-z 0-9 . _ - and not begin "
        "with . or -"
    ]


def check_run_folder(
    run_dir: Path, output_dir: Path, *, needed_bytes: int, runtime: Runtime
) -> None:
    """Make the run folder, and make sure that every rank can write it, that all see the same one.

    Every rank calls this. Nothing stays behind.

    Args:
        run_dir: The run folder.
        output_dir: The folder it must lie in, wherever links lead.
        needed_bytes: What the run is going to write.
        runtime: This rank.

    Raises:
        ValueError: On rank 0, if anything is wrong.
    """
    token = runtime.gather(uuid.uuid4().hex)[0]
    probes = [run_dir / f".probe-{token}-{rank}" for rank in range(runtime.world_size)]
    try:
        runtime.main_first(lambda: _make(run_dir, output_dir, runtime))
        runtime.on_every_rank(lambda: _write(probes[runtime.rank]))
        seen = probes if runtime.is_main else probes[:1]
        runtime.on_every_rank(lambda: _wait_for(seen))
        check_space(run_dir, needed_bytes, runtime)
    finally:
        with suppress(OSError):  # it may never have been written
            probes[runtime.rank].unlink()


def check_space(folder: Path, needed_bytes: int, runtime: Runtime) -> None:
    """Make sure that so much can be written, and some more; every rank calls this.

    Raises:
        ValueError: On rank 0, if there is less on any host.
    """

    def check() -> None:
        needed, free = SPARE * needed_bytes, shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"output_dir: {folder} needs {_gib(needed)}, {_gib(free)} free, delete what is "
                "old, keep fewer checkpoints or choose another folder"
            )

    runtime.on_every_rank(check)


def _make(run_dir: Path, output_dir: Path, runtime: Runtime) -> None:
    try:
        real, outputs = run_dir.resolve(), output_dir.resolve()
        if outputs not in real.parents:
            raise ValueError(
                f"name: {run_dir} leads to {real}, outside of {outputs}, take the link away or "
                "choose another --name"
            )
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


def _write(probe: Path) -> None:
    """Write a file, down to the disk."""
    try:
        with probe.open("x") as file:
            file.write(probe.name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"output_dir: {probe.parent} cannot be written, {error}, choose a folder you may write"
        ) from error


def _wait_for(probes: list[Path]) -> None:
    """Read the files that other ranks have written."""
    deadline = time.monotonic() + SHARED_WITHIN_SECONDS
    for probe in probes:
        while not _is_whole(probe):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"output_dir: {probe.parent} is not the same folder on all hosts, what rank "
                    f"{probe.name.rpartition('-')[2]} wrote is not there, choose a folder that all "
                    "hosts share"
                )
            time.sleep(0.1)


def _is_whole(probe: Path) -> bool:
    try:
        return probe.read_text() == probe.name
    except OSError:
        return False


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
