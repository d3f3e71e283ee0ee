"""A picture of numbers in rows and columns, as sinks of metrics take it, and its PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_LABELS = 12
"""Most labels along an axis; of more, evenly spaced ones are shown."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Numbers in rows and columns; NaN where there is none."""

    title: str
    values: Sequence[Sequence[float]]
    """[rows][columns], the first row at the top."""
    rows: Sequence[str]
    """A label for each row."""
    columns: Sequence[str]
    """A label for each column."""
    row_axis: str
    """What the rows are, as "layers run (E)"."""
    column_axis: str
    """What the columns are, as "step"."""
    unit: str = ""
    """What the numbers are, beside the colours."""
    low: float | None = None
    """The number of the darkest colour; None: the least."""
    high: float | None = None
    """The number of the brightest colour; None: the greatest."""
    marks: Sequence[int] = ()
    """Columns before which a line is drawn, as where a run was resumed."""


def png_of(heat_map: HeatMap) -> bytes:
    """Draw a heat map, in colours that grow evenly brighter for every eye."""
    # Takes a second, so only where it is used; without pyplot, which keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    values = np.array(heat_map.values)
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        vmin=heat_map.low,
        vmax=heat_map.high,
    )
    for mark in filter(None, heat_map.marks):
        axes.axvline(mark - 0.5, color="white", linewidth=1, linestyle="--")
    axes.set_title(heat_map.title, fontsize=10, loc="left")
    axes.set_ylabel(heat_map.row_axis)
    axes.set_xlabel(heat_map.column_axis)
    axes.set_yticks(*_ticks(heat_map.rows))
    axes.set_xticks(*_ticks(heat_map.columns))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    clipped = heat_map.high is not None and (values > heat_map.high).any()
    bar = figure.colorbar(image, label=heat_map.unit, extend="max" if clipped else "neither")
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def picture_of(heat_map: HeatMap) -> "Image.Image":
    """Return a heat map as trackers take images."""
    from PIL import Image

    return Image.open(io.BytesIO(png_of(heat_map)))


def _ticks(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    apart = -(-len(labels) // MAX_LABELS)
    shown = list(range(0, len(labels), apart))
    return shown, [labels[i] for i in shown]
