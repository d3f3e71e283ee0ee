"""Log metrics: log(metrics, step) writes JSONL always, and to dashboards where configured."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.parallel.runtime import Runtime
from train.run_folder.dashboards import Dashboards
from train.run_folder.event_file import TensorBoard, has_event_files
from train.run_folder.events import EventLog, State
from train.run_folder.heat_map import HeatMap
from train.run_folder.histogram import Histogram
from train.run_folder.settings_text import settings_text
from train.run_folder.sinks import Metrics, Sink
from train.run_folder.writing import GrowingFile, attempt, replace_file

logger = logging.getLogger(__name__)

MAX_GROUP, MAX_TAG = 128, 64
"""Most characters that W&B takes."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The sinks of metrics. `metrics.jsonl` in the run folder is always written.

    None can end a run: one that fails costs its points and a warning, and is tried again.
    """

    interval_steps: int = 10
    """Steps between log lines; losses are means over them."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb: bool = False
    """Log to Weights & Biases; where its server does not answer within seconds, or with
    WANDB_MODE=offline, to this machine alone."""
    wandb_project: str = "skipstone"
    """Project to log under, on W&B and Trackio."""
    wandb_entity: str = ""
    """User or team to log under on W&B; empty: the user's default."""
    group: str = ""
    """Group of this run on W&B and Trackio, for runs to compare; train.sweep gives its runs one."""
    tags: tuple[str, ...] = ()
    """Tags of this run on W&B."""
    trackio: bool = False
    """Log to Trackio on this machine, for `trackio show`; pip install 'skipstone[trackio]'."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if self.interval_steps < 1:
            found.append(f"metrics.interval_steps: {self.interval_steps}, must be at least 1")
        if len(self.group) > MAX_GROUP:
            found.append(
                f"metrics.group: {self.group:.20}..., shorten it to {MAX_GROUP} characters"
            )
        found += [
            f"metrics.tags: {tag:.20!r}, must have 1 to {MAX_TAG} characters"
            for tag in self.tags
            if not 1 <= len(tag) <= MAX_TAG
        ]
        return found


class JsonLines:
    """One JSON object per line, without those of steps that a resumed run repeats."""

    def __init__(self, path: Path, done_steps: int) -> None:
        """Keep the records up to step `done_steps`."""
        self.target = path
        self._file, self._done_steps = GrowingFile(path), done_steps
        self._is_cut = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append them as one line."""
        self._append({"step": step, **metrics})

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Append them as one line."""
        fields = {name: asdict(histogram) for name, histogram in histograms.items()}
        self._append({"step": step, **fields})

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Append them as one line, each as {"text": ...}."""
        fields = {name: {"text": text} for name, text in texts.items()}
        self._append({"step": step, **fields})

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Write nothing: their numbers are in the lines already."""

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Write nothing: it is the last of the lines, and status.json."""

    def _append(self, record: Mapping[str, object]) -> None:
        if not self._is_cut:
            _cut(self.target, self._done_steps)
            self._is_cut = True
        self._file.append((json.dumps(record) + "\n").encode())


def _cut(path: Path, done_steps: int) -> None:
    """Drop the records of later steps, and damaged ones."""
    before = path.read_bytes() if path.is_file() else b""
    kept = []
    for line in before.splitlines():
        try:
            if json.loads(line)["step"] <= done_steps:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.warning("metrics: dropped a damaged line of %s: %.60r", path, line)
    if (after := b"".join(kept)) != before:
        replace_file(path, after)


def open_metrics(
    config: MetricsConfig,
    run_dir: Path,
    run_config: dict[str, Any],
    *,
    done_steps: int,
    runtime: Runtime,
    preset: dict[str, Any] | None = None,
    trackers: Sequence[Sink] = (),
) -> Metrics:
    """Open the sinks of a run that has done `done_steps` steps, on rank 0.

    Args:
        config: The sinks.
        run_dir: The run folder.
        run_config: The whole configuration, to show.
        done_steps: Steps done; what was logged of later ones is dropped.
        runtime: This rank.
        preset: The configuration of the preset, to show what differs from it.
        trackers: W&B and Trackio, open.
    """
    if not runtime.is_main:
        return Metrics([])
    records = run_dir / "metrics.jsonl"
    board: list[Sink] = []
    if config.tensorboard:
        board.append(TensorBoard(run_dir, done_steps, run_config))
    dashboards = [*board, *trackers]
    if not dashboards:
        return Metrics([JsonLines(records, done_steps)])
    shown = Dashboards(dashboards)
    attempt(
        "dashboards",
        lambda: shown.open(
            records,
            EventLog(run_dir / "events.jsonl", writes=False).read(),
            done_steps,
            settings=settings_text(run_config, preset),
            late=() if has_event_files(run_dir) else board,
        ),
    )
    return Metrics([JsonLines(records, done_steps), shown])
