"""Log metrics: log(metrics, step) writes JSONL always, TensorBoard and W&B where configured."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from train.parallel.runtime import Runtime
from train.run_folder.event_file import TensorBoard
from train.run_folder.events import State
from train.run_folder.heat_map import HeatMap
from train.run_folder.histogram import Histogram
from train.run_folder.weights_and_biases import WeightsAndBiases
from train.run_folder.writing import GrowingFile, attempt, replace_file

logger = logging.getLogger(__name__)


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
    """Project to log under."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        if self.interval_steps < 1:
            return [f"metrics.interval_steps: {self.interval_steps}, must be at least 1"]
        return []


class Sink(Protocol):
    """A destination of metrics; any of its methods may raise anything."""

    @property
    def target(self) -> Path | str:
        """What it writes, for messages."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        ...

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write the histograms of one step."""
        ...

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write Markdown texts of one step."""
        ...

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Draw pictures of one step, each in place of the one before of its name."""
        ...

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Write what the run ended with, for a table of runs; nothing follows it."""
        ...


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


class Metrics:
    """All sinks of a run; none on ranks other than 0."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of one step to every sink."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log, metrics, step))

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Send the histograms of one step to every sink."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_histograms, histograms, step))

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Send Markdown texts of one step to every sink."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_texts, texts, step))

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Send pictures of numbers that were logged too to every sink that shows pictures."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_heat_maps, maps, step))

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Send what the run ended with to every sink; nothing follows it."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_summary, values, state))


def open_metrics(
    config: MetricsConfig,
    run_dir: Path,
    run_config: dict[str, Any],
    *,
    done_steps: int,
    runtime: Runtime,
    wandb: WeightsAndBiases | None = None,
) -> Metrics:
    """Open the sinks of a run that has done `done_steps` steps, on rank 0; `wandb` is open."""
    if not runtime.is_main:
        return Metrics([])
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", done_steps)]
    if config.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", done_steps, run_config))
    if wandb is not None:
        sinks.append(wandb)
    return Metrics(sinks)
