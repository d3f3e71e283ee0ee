"""What a report finds beside a run: its files of earlier measurements, where they still fit."""

import shlex
from pathlib import Path
from typing import Any

from data.foreign_json import build, read_object, take
from data.urls import Location
from inference.cli.terminal import report_line
from inference.evaluation.exit_quality import ExitQuality, evaluate_run
from inference.loading.machine import machine
from inference.loading.run import Run
from inference.loading.tuned import lossless_records, tuned_path
from inference.report_page.exits import RunExits
from inference.report_page.measurements import Arms, Tuning, read_benchmark, tuning_from
from inference.report_page.source import OWN, Source, date_of, file_date, machine_line

EXITS, SPEED = "exits.json", "speed.json"


def reports_folder(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's reports: its run's, or one beside it."""
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "reports"
    return checkpoint.with_name(checkpoint.name + ".reports")


def find_exits(run: Run, name: str, data: Location | None, *, max_tokens: int) -> RunExits:
    """Return the quality of the exits, out of the run's reports, or measured."""
    path = reports_folder(run.checkpoint) / EXITS
    if data is None and path.is_file():
        try:
            return _read_exits(path, run, name)
        except (ValueError, OSError) as error:
            report_line(f"{path}: left out ({error}), measuring")
    try:
        dataset = run.open_data(data)
    except ValueError as error:
        if data is not None:
            raise
        return RunExits(name, [], 0, None, str(error))
    report_line(f"measuring: exits of {name}, up to {max_tokens} held-out tokens of {dataset.path}")
    exits, tokens = evaluate_run(run, dataset, max_tokens=max_tokens)
    here = machine()
    how = f"{tokens:,} held-out tokens of {dataset.path}"
    return RunExits(name, exits, tokens, Source(OWN, how, machine_line(here), date_of(here)))


def _read_exits(path: Path, run: Run, name: str) -> RunExits:
    """Return what `inference.evaluate --json` wrote of this step and depth.

    Raises:
        ValueError: It is of another step or no such file.
    """
    content = read_object(path)
    step, tokens = take(content, "step", int), take(content, "tokens", int)
    exits = [build(ExitQuality, each) for each in take(content, "exits", list[dict[str, Any]])]
    if step != run.manifest.step or len(exits) != run.model.config.n_layers:
        raise ValueError(f"of step {step} and {len(exits)} exits")
    where = take(content, "checkpoint", str), take(content, "data", str)
    here = take(content, "machine", dict[str, Any]) if "machine" in content else {}
    source = Source(
        "python -m inference.evaluate " + shlex.join(["--run", where[0], "--json", path.name]),
        f"read from {path.name}, {tokens:,} held-out tokens of {where[1]}",
        machine_line(here) if here else "",
        date_of(here) or file_date(path),
    )
    return RunExits(name, exits, tokens, source)


def find_tuning(run: Run) -> Tuning | None:
    """Return what `inference.tune` kept beside the checkpoint, the newest of use."""
    path = tuned_path(run)
    try:
        records = lossless_records(run)
    except ValueError as error:
        report_line(str(error))
        return None
    for record in reversed(records):
        try:
            return tuning_from(record, run.model.config.n_layers, path)
        except ValueError as error:
            report_line(f"{path}: a record left out ({error})")
    return None


def find_arms(run: Run, benchmark: Path | None) -> Arms | None:
    """Return the arms of a benchmark: the one named, or of the run's reports where it fits."""
    if benchmark is not None:
        return read_benchmark(benchmark, "benchmark")
    path = reports_folder(run.checkpoint) / SPEED
    if not path.is_file():
        return None
    try:
        return read_benchmark(path, "reports", run.manifest.step)
    except ValueError as error:
        report_line(f"{error}; measuring")
        return None
