"""What a run that is done came to, where its files are, and what comes next: the last log lines."""

import logging
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from train.config.config import TrainConfig
from train.job import Job
from train.loop.report import clock
from train.loop.run_state import RunState
from train.run_folder.events import Event, first_start, goodput, starts
from train.run_folder.records import read_records
from train.run_folder.writing import attempt

logger = logging.getLogger(__name__)

NEAR = 0.02
"""How far above the last layer's held-out loss an exit's may lie, for the exit to do as well."""
_TAIL_BYTES = 2**20


def log_summary(job: Job, state: RunState) -> None:
    """Log the summary of a run that has done its last step; rank 0 alone."""
    if job.runtime.is_main:
        attempt("summary", lambda: _log(job, state))


def _log(job: Job, state: RunState) -> None:
    config = job.config
    metrics = read_last(config.run_dir / "metrics.jsonl")
    lines = [
        _time_line(config, state, job.events.read(), time.time()),
        best_exit_line(metrics, config.model.n_layers),
        _drafts_line(metrics),
        *_where_lines(config),
    ]
    for line in filter(None, lines):
        logger.info("%s", line)


def read_last(path: Path) -> dict[str, float]:
    """Return the last value of every number in metrics.jsonl, of the last megabyte."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).splitlines()
    found: dict[str, float] = {}
    for _, numbers in read_records(lines):
        found |= numbers
    return found


def best_exit_line(metrics: Mapping[str, float], L: int) -> str:
    """Return the exit that does about as well as all L layers, and the lowest loss; or nothing.

    E = number of layers run. One layer has no exit but its end.
    """
    if L == 1:
        return ""
    named = {E: metrics.get(f"validation/loss_exit_{E:02d}") for E in range(1, L + 1)}
    losses = {E: loss for E, loss in named.items() if loss is not None and loss == loss}
    if L not in losses:
        return ""
    near = next(E for E, loss in losses.items() if loss <= (1 + NEAR) * losses[L])
    lowest = min(losses, key=lambda E: losses[E])
    return (
        f"best exit: E={near} of {L}, held-out loss {losses[near]:.3f}, the first within "
        f"{NEAR:.0%} of all layers' {losses[L]:.3f}; lowest {losses[lowest]:.3f} at E={lowest}"
    )


def _drafts_line(metrics: Mapping[str, float]) -> str:
    bounds = {name: v for name, v in metrics.items() if name.startswith("speculation/bound_")}
    if not bounds:
        return ""
    best = max(bounds, key=lambda name: bounds[name])
    _, E, d = best.rsplit("_", 2)
    gain = "" if bounds[best] > 1 else ", so none gains"
    speed = f"{bounds[best]:.2f}x the speed of plain decoding"
    return f"drafts: E={E[1:]} d={d[1:]} allow at most {speed}{gain}"


def _time_line(config: TrainConfig, state: RunState, events: list[Event], now: float) -> str:
    restarts = starts(events) - 1
    again = f", {restarts} {'restart' if restarts == 1 else 'restarts'}" if restarts > 0 else ""
    return (
        f"finished: {config.steps:,} steps, {state.tokens:,} tokens in "
        f"{clock(now - (first_start(events) or now))}, goodput "
        f"{goodput(state.productive_seconds, events, now):.1%}{again}"
    )


def _where_lines(config: TrainConfig) -> list[str]:
    run_dir, run = config.run_dir, str(config.run_dir)
    if config.checkpoint.folder:
        run = str(config.checkpoint_folder)
    step = f"step-{config.steps:08d}"
    folder = f"{config.checkpoint_folder}" if config.checkpoint.folder else "checkpoints"
    files = [f"{folder}/{step}", "metrics.jsonl"]
    files += [f"samples/{step}.md"] if (run_dir / "samples" / f"{step}.md").exists() else []
    lines = [f"in {run_dir}: {', '.join(files)}"]
    if config.metrics.tensorboard:
        lines.append(f"watch: tensorboard --logdir {shlex.quote(str(config.output_dir))}")
    command = f"python -m inference.tune --run {shlex.quote(run)} --quick"
    if config.model.n_layers == 1:
        command = f"python -m inference.generate --run {shlex.quote(run)}"
    return [*lines, f"next: {command}"]
