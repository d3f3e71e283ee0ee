"""The pictures of a run over all its steps: layers, exits or drafts as rows, steps as columns.

Their numbers are those of metrics.jsonl, so that a resumed run draws the steps before too.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from train.run_folder.heat_map import HeatMap

MAX_COLUMNS = 240
"""Most steps in a picture: of more, every second is left out."""
MAX_ROWS = 512
_LAYERS_RUN = "layers run (E)"


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A picture, and the metrics it is made of."""

    pattern: str
    """Its groups are the label of a row."""
    title: str
    row_axis: str = _LAYERS_RUN
    label: str = r"\1"
    unit: str = ""
    low: float | None = None
    high: float | None = None
    clipped: bool = False
    """Whether the highest tenth of the numbers has one colour, as the losses of the first steps."""


_OF_EXITS = r"loss_exit_0*(\d+)"
KINDS: Mapping[str, _Kind] = {
    "losses_held_out/all_exits": _Kind(
        pattern=f"validation/{_OF_EXITS}",
        title="Held-out loss of every exit",
        unit="loss (nats per token)",
        clipped=True,
    ),
    "losses_train/all_exits": _Kind(
        pattern=f"train/{_OF_EXITS}",
        title="Training loss of every exit, while layers are dropped",
        unit="loss (nats per token)",
        clipped=True,
    ),
    "schedule/dropped_layers": _Kind(
        pattern=r"layerskip/drop_prob_0*(\d+)",
        title="Dropped layers: how likely a sequence skips each",
        row_axis="layer",
        unit="probability",
        low=0.0,
    ),
    "speculation/agreement": _Kind(
        pattern=r"early_exit/agreement_exit_0*(\d+)",
        title="Agreement of every exit with the last layer's token",
        unit="share of tokens",
        low=0.0,
        high=1.0,
    ),
    "speculation/acceptance": _Kind(
        pattern=r"speculation/acceptance_E0*(\d+)_d0*(\d+)",
        title="Acceptance: share of drafted tokens that the last layer keeps",
        row_axis="layers run (E), draft length (d)",
        label=r"E=\1 d=\2",
        unit="share of drafted tokens",
        low=0.0,
        high=1.0,
    ),
    "updates/rms_by_layer": _Kind(
        pattern=r"adam/update_rms/(.+)",
        title="Adam: RMS of the update ratio",
        row_axis="parameters",
        low=0.0,
    ),
    "updates/starved_by_layer": _Kind(
        pattern=r"adam/share_starved/(.+)",
        title="Adam: share of coordinates that eps starves",
        row_axis="parameters",
        unit="share",
        low=0.0,
        high=1.0,
    ),
    "updates/correlation_by_layer": _Kind(
        pattern=r"adam/lag1/(.+)",
        title="Adam: correlation of gradients from step to step",
        row_axis="parameters",
    ),
}


@dataclass
class _Rows:
    """The numbers of one picture by step."""

    columns: dict[int, dict[str, float]] = field(default_factory=dict)
    every: int = 1
    """Of so many records, one is kept."""
    records: int = 0

    def add(self, step: int, values: dict[str, float]) -> None:
        self.records += 1
        if (self.records - 1) % self.every:
            return
        self.columns[step] = values
        if len(self.columns) > MAX_COLUMNS:
            self.columns = dict(list(self.columns.items())[::2])
            self.every *= 2


class Pictures:
    """Collects what is logged, and draws it."""

    def __init__(self) -> None:
        self._rows = {name: _Rows() for name in KINDS}
        self._starts: list[int] = []
        self._count: float | None = None

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add what was logged at one step."""
        found: dict[str, dict[str, float]] = {}
        for metric, value in metrics.items():
            if row := _row_of(metric):
                name, label = row
                found.setdefault(name, {})[label] = value
        for name, values in found.items():
            self._rows[name].add(step, values)
        if "progress/restarts" in metrics:
            count = metrics["progress/restarts"] + metrics.get("progress/rollbacks", 0.0)
            if self._count is not None and count != self._count:
                self._starts.append(step)
            self._count = count

    def draw(self) -> dict[str, HeatMap]:
        """Return the pictures that there are numbers for."""
        return {
            name: self._heat_map(KINDS[name], rows.columns)
            for name, rows in self._rows.items()
            if rows.columns
        }

    def _heat_map(self, kind: _Kind, columns: Mapping[int, Mapping[str, float]]) -> HeatMap:
        labels = {label for column in columns.values() for label in column}
        # The last layer at the top; of parameters, the alphabet from the top.
        rows = sorted(labels, key=_numbers, reverse=kind.row_axis != "parameters")[:MAX_ROWS]
        steps = sorted(columns)
        values = [[columns[step].get(row, math.nan) for step in steps] for row in rows]
        return HeatMap(
            title=kind.title,
            values=values,
            rows=rows,
            columns=[f"{step:,}" for step in steps],
            row_axis=kind.row_axis,
            column_axis="step",
            unit=kind.unit,
            low=kind.low,
            high=_ninth_decile(values) if kind.clipped else kind.high,
            marks=[sum(step < mark for step in steps) for mark in self._starts],
        )


@lru_cache(4096)
def _row_of(metric: str) -> tuple[str, str] | None:
    """Return the picture that a metric is in and the label of its row, if it is in one."""
    for name, kind in KINDS.items():
        if match := re.fullmatch(kind.pattern, metric):
            return name, match.expand(kind.label)
    return None


def _ninth_decile(values: Sequence[Sequence[float]]) -> float | None:
    finite = sorted(value for row in values for value in row if math.isfinite(value))
    return finite[len(finite) * 9 // 10] if finite else None


def _numbers(label: str) -> list[str | int]:
    """Return what labels sort by: E=2 before E=10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]
