"""The record of a run in its folder: how it began, how it stands, how it ended."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.flops import total_params
from train.config.config import TrainConfig
from train.monitoring.sections import Sections
from train.parallel.runtime import Runtime
from train.run_folder.events import EventLog, State, append_event, write_status_files
from train.run_folder.preflight import remove_made
from train.run_folder.run_lock import RunLock
from train.run_folder.writing import attempt, replace_file

logger = logging.getLogger(__name__)


def record_start(config: TrainConfig, runtime: Runtime, events: EventLog, start: int) -> None:
    """Record the start of the run, write its `config.json` and log its size."""
    events.append("start", start, world_size=runtime.world_size)
    write_status(config, runtime, "running", start)
    if not runtime.is_main:
        return
    path, text = config.run_dir / "config.json", json.dumps(config.as_dict(), indent=1) + "\n"
    attempt(path, lambda: replace_file(path, text.encode()))
    logger.info(
        "%s: %.1fM parameters on %d x %s, %d steps of %s tokens",
        config.run_dir,
        total_params(config.model) / 1e6,
        runtime.world_size,
        runtime.device_name(),
        config.steps,
        f"{config.data.tokens_per_step:,}",
    )


@contextmanager
def record_failure(
    config: TrainConfig,
    runtime: Runtime,
    lock: RunLock,
    events: EventLog,
    sections: Sections,
    made: tuple[Path, ...],
) -> Iterator[None]:
    """Record in the run folder, if it is still ours, that the `with` block failed, and why.

    Of a new run that is refused before its first step, the folders `made` for it are removed.
    """
    try:
        yield
    except Exception as error:
        if not lock.lost:
            reason = f"{type(error).__name__}: {error}"
            section, t, _ = sections.current
            events.append("failed", t, reason=reason)
            write_status(config, runtime, "failed", t, reason)
            if section == "setup" and isinstance(error, ValueError | OSError):
                remove_made(made)
        raise


def record_hang(path: Path, reason: str, t: int) -> None:
    """Append a hang to the events; not by EventLog, as the rank may be another than rank 0."""
    append_event(path, "hang", t, reason=reason)


def write_status(
    config: TrainConfig, runtime: Runtime, state: State, step: int, reason: str = ""
) -> None:
    """Write the status of the run to its folder and to runtime.status_file, if there is one."""
    if runtime.is_main:
        status_file = config.runtime.status_file
        paths = [config.run_dir / "status.json", *([Path(status_file)] if status_file else [])]
        write_status_files(paths, state, step, reason)
