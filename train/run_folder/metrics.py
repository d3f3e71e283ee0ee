"""Log metrics: log(metrics, step) writes JSONL always, TensorBoard and W&B where configured."""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The sinks of metrics. `metrics.jsonl` in the run folder is always written."""

    interval_steps: int = 10
    """Steps between log lines; losses are means over them."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb: bool = False
    """Log to Weights & Biases (with WANDB_MODE=offline, to this machine alone)."""
    wandb_project: str = "skipstone"
    """Project to log under."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        if self.interval_steps < 1:
            return [f"metrics.interval_steps: {self.interval_steps}, must be at least 1"]
        return []


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins of equal width."""

    counts: list[int]
    low: float
    """Lower edge of the first bin, which includes all numbers below."""
    high: float
    """Upper edge of the last bin, which includes all numbers above."""


class Sink(Protocol):
    """A destination of metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        ...

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write the histograms of one step."""
        ...

    def close(self) -> None:
        """Flush and close it."""
        ...


class JsonLines:
    """One JSON object per line, without those of steps that a resumed run repeats."""

    def __init__(self, path: Path, done_steps: int) -> None:
        """Open the file, keeping the records up to step `done_steps`."""
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= done_steps:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    logger.warning("metrics: dropped a damaged line of %s: %.60r", path, line)
        path.write_text("".join(kept))
        self._file = path.open("a")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append them as one line."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Append them as one line."""
        fields = {name: asdict(histogram) for name, histogram in histograms.items()}
        self._file.write(json.dumps({"step": step, **fields}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars, and two charts of all exits side by side under Custom Scalars."""

    def __init__(self, folder: Path, done_steps: int, config: dict[str, Any]) -> None:
        """Open the event file; points after step `done_steps` are purged."""
        self._writer = SummaryWriter(str(folder), purge_step=done_steps + 1)
        charts = {
            title: ["Multiline", [rf"{split}/loss_exit_\d+"]]
            for title, split in (("training", "train"), ("held out", "validation"))
        }
        self._writer.add_custom_scalars({"loss at every exit": charts})
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", done_steps)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to every curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Add one slice to every histogram."""
        for name, histogram in histograms.items():
            counts = np.array(histogram.counts)
            edges = np.linspace(histogram.low, histogram.high, len(counts) + 1)
            middles = (edges[1:] + edges[:-1]) / 2
            self._writer.add_histogram_raw(
                name,
                min=histogram.low,
                max=histogram.high,
                num=int(counts.sum()),
                sum=float(counts @ middles),
                sum_squares=float(counts @ middles**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run folder, continued when the run resumes."""

    def __init__(self, folder: Path, project: str, name: str, config: dict[str, Any]) -> None:
        """Start the run, or continue the one whose id is in the folder."""
        import wandb  # takes seconds, so only where it is used

        id_file = folder / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=project,
            name=name,
            id=id_file.read_text(),
            resume="allow",
            dir=folder,
            config=config,
        )
        # Not W&B's own count of steps, which cannot decrease, as the run's does in a rollback.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        self._run.log({"step": step, **metrics})

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Log them all at once."""
        self._run.log(
            {"step": step}
            | {
                name: self._histogram(
                    np_histogram=(h.counts, np.linspace(h.low, h.high, len(h.counts) + 1))
                )
                for name, h in histograms.items()
            }
        )

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """All sinks of a run; none on ranks other than 0."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of one step to every sink."""
        for sink in self._sinks:
            sink.log(metrics, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Send the histograms of one step to every sink."""
        for sink in self._sinks:
            sink.log_histograms(histograms, step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_metrics(
    config: MetricsConfig,
    run_dir: Path,
    run_config: dict[str, Any],
    *,
    done_steps: int,
    runtime: Runtime,
) -> Metrics:
    """Open the sinks of a run that has done `done_steps` steps, on rank 0."""
    if not runtime.is_main:
        return Metrics([])
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", done_steps)]
    if config.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", done_steps, run_config))
    if config.wandb:
        sinks.append(WeightsAndBiases(run_dir, config.wandb_project, run_dir.name, run_config))
    return Metrics(sinks)
