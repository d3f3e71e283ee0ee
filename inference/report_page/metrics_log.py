"""The losses of a run by exit and step, out of its `metrics.jsonl`, which others may have written.

A line that cannot be read is left out and counted: a run that is still training is in the middle of
its last one.
"""

import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.foreign_json import parse
from data.urls import Location

LOG = "metrics.jsonl"
MAX_LOG_BYTES = 2**30
_MAX_LINE_BYTES = 2**20
_MAX_EXITS = 512
_MAX_STEP = 2**53
_NAME = re.compile(r"(train|validation)/loss_exit_(\d{1,4})")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One exit's loss."""

    steps: Array
    """Ascending."""
    losses: Array
    """Nats per token; NaN where training logged no finite number."""

    def thinned(self, points: int) -> "Series":
        """Return at most about `points` points, each the mean of its stretch of steps."""
        if len(self.steps) <= points:
            return self
        edges = np.linspace(self.steps[0], self.steps[-1], points + 1)
        means = binned(self, edges)
        return Series((edges[:-1] + edges[1:]) / 2, means)


@dataclass(frozen=True)
class LossLog:
    """What training logged."""

    train: Mapping[int, Series] = field(default_factory=dict)
    """By E; means since the line before."""
    validation: Mapping[int, Series] = field(default_factory=dict)
    tokens: float | None = None
    """Tokens read by the last line."""
    tokens_per_second: float | None = None
    """Median of the lines."""
    unread: int = 0
    """Lines that could not be read."""
    not_finite: int = 0
    """Losses that are no finite number."""


def binned(series: Series, edges: Array) -> Array:
    """Return the mean loss between neighbouring edges; NaN where there is none."""
    known = np.isfinite(series.losses)
    steps, losses = series.steps[known], series.losses[known]
    counts, _ = np.histogram(steps, edges)
    sums, _ = np.histogram(steps, edges, weights=losses)
    with np.errstate(invalid="ignore"):
        means: Array = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return means


def read_losses(run: Location) -> LossLog | None:
    """Return the losses of a run folder, or of the run a checkpoint folder lies in; or None."""
    for folder in (run, run.parent.parent):
        if (folder / LOG).is_file():
            return _read(folder / LOG)
    return None


def _read(path: Location) -> LossLog:
    values: dict[tuple[str, int], tuple[array[float], array[float]]] = defaultdict(
        lambda: (array("d"), array("d"))
    )
    speeds, tokens, unread = array("d"), None, 0
    for line in _lines(path):
        content = _parse(line)
        if content is None:
            unread += 1
            continue
        step = _number(content["step"], None) or 0.0
        tokens = _number(content.get("progress/tokens"), tokens)
        if (speed := _number(content.get("perf/tokens_per_second"), None)) is not None:
            speeds.append(speed)
        for name, value in content.items():
            match = _NAME.fullmatch(name) if "/loss_exit_" in name else None
            if match and 1 <= int(match[2]) <= _MAX_EXITS:
                loss = _number(value, np.nan)
                if loss is not None:
                    steps, losses = values[match[1], int(match[2])]
                    steps.append(step)
                    losses.append(loss)
    series = {key: _last_of_each_step(*pair) for key, pair in sorted(values.items())}
    return LossLog(
        train={E: s for (split, E), s in series.items() if split == "train"},
        validation={E: s for (split, E), s in series.items() if split == "validation"},
        tokens=tokens,
        tokens_per_second=float(np.median(speeds)) if speeds else None,
        unread=unread,
        not_finite=sum(int((~np.isfinite(s.losses)).sum()) for s in series.values()),
    )


def _lines(path: Location) -> Iterator[bytes]:
    """Yield the lines, of an endless one a part that is no JSON, up to the ceiling of bytes."""
    left = MAX_LOG_BYTES
    with path.open("rb") as file:
        while left > 0 and (line := file.readline(_MAX_LINE_BYTES)):
            left -= len(line)
            if line.strip():
                yield line


def _parse(line: bytes) -> dict[str, object] | None:
    """Return the metrics of a line and its step; None: it is none."""
    try:
        content = parse(line, finite=False)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    step = content.get("step")
    known = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MAX_STEP
    return content if known else None


def _number(value: object, default: float | None) -> float | None:
    """Return a number, `default` where it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    return float(value) if abs(value) < 1e300 else default


def _last_of_each_step(steps: "array[float]", losses: "array[float]") -> Series:
    """Return the series in the order of steps: a resumed run logs some of them again."""
    found, last = np.unique(np.array(steps)[::-1], return_index=True)
    return Series(found, np.array(losses)[::-1][last])
