"""The losses of training, by exit and step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference.report_page.drawing import (
    INK,
    MARKERS,
    SERIES,
    Picture,
    depth_color,
    drawn,
    exit_ticks,
    light_grid,
    within,
)
from inference.report_page.metrics_log import Array, LossLog, binned
from inference.report_page.page import Section, figure, note
from inference.report_page.source import Source

_COLUMNS, _POINTS, _CURVES = 160, 300, 8
_PIXELS = 640
"""Columns of the image that the heat map is."""


@dataclass(frozen=True)
class Logged:
    """The log of a run of this name."""

    name: str
    log: LossLog | None


def training_section(runs: Sequence[Logged], sources: Sequence[Source]) -> Section:
    """Return the losses of the first run, and beside them the last layer's of the others."""
    first, *others = runs
    title = "Loss by exit and step"
    missing = [
        note(f"{r.name}: no metrics.jsonl, so no losses of training.") for r in runs if not r.log
    ]
    remarks = [*missing, *(note(text) for run in runs if run.log for text in _remarks(run))]
    if first.log is None or not first.log.train:
        none = "" if first.log is None else note("No training loss of an exit is logged.")
        return Section("training", title, none + "".join(remarks))
    log, L = first.log, max(first.log.train)
    several = [run for run in others if run.log is not None and run.log.train]
    picture = drawn(
        Picture(
            "training",
            f"Training loss of exits 1 to {L} over steps, as a heat map and as curves",
            lambda figure: _draw(figure, log, L, several),
            (9.4, 4.0),
        )
    )
    caption = (
        "<b>Left:</b> training loss of every exit (rows: E, the layers run before it), mean of "
        "each stretch of steps; blank where an exit was off or its loss no number. <b>Right:</b> "
        "the same as lines, coloured by depth, with the held-out loss as points."
    )
    if several:
        caption += " Dashed: the last exit of the other runs."
    return Section(
        "training", title, figure(picture, caption, sources[0]) + "".join(remarks), (picture,)
    )


def _remarks(run: Logged) -> list[str]:
    """Return what of a log could not be drawn."""
    assert run.log is not None
    found = []
    if run.log.unread:
        lines = "1 line" if run.log.unread == 1 else f"{run.log.unread} lines"
        found.append(f"{run.name}: {lines} of metrics.jsonl could not be read, and left out.")
    if run.log.not_finite:
        found.append(
            f"{run.name}: {run.log.not_finite} logged losses are no finite number; they stay blank."
        )
    return found


def _draw(figure: Figure, log: LossLog, L: int, others: Sequence[Logged]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    _draw_heat(figure, left, log, L)
    _draw_curves(right, log, L)
    for run, color in zip(others, SERIES[1:], strict=False):
        assert run.log is not None
        last = run.log.train[max(run.log.train)].thinned(_POINTS)
        right.plot(
            last.steps, last.losses, color=color, linestyle="--", label=f"{run.name[:40]}, last"
        )
    right.legend(fontsize=8, ncols=2 if len(right.get_legend_handles_labels()[0]) > 5 else 1)


def _draw_heat(figure: Figure, axes: Axes, log: LossLog, L: int) -> None:
    edges = stretches(np.concatenate([series.steps for series in log.train.values()]))
    rows = np.full((L, len(edges) - 1), np.nan)
    for E, series in log.train.items():
        rows[E - 1] = binned(series, edges)
    low, high = within(rows, 2.0)[0], within(rows, 10.0)[1]
    # Stretches are as wide as they are long, and an image's columns all alike.
    at = np.linspace(edges[0], edges[-1], 2 * _PIXELS + 1)[1::2]
    column = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, len(edges) - 2)
    image = axes.imshow(
        rows[:, column],
        aspect="auto",
        interpolation="none",
        cmap="cividis",
        vmin=low,
        vmax=high,
        extent=(edges[0], edges[-1], L + 0.5, 0.5),
    )
    axes.set(title="Training loss", xlabel="optimizer step", ylabel="E, layers run before the exit")
    exit_ticks(axes.yaxis, L)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, extend="max")
    bar.set_label("nats per token")
    bar.outline.set_visible(False)


def stretches(steps: Array) -> Array:
    """Return the edges of stretches of steps, with as many logged steps in each, at least one.

    Args:
        steps: Those logged, at least one, in any order and distance.
    """
    found = np.unique(steps)
    parts = np.array_split(found, min(_COLUMNS, len(found)))
    between = [(one[-1] + other[0]) / 2 for one, other in pairwise(parts)]
    before = between[0] - found[0] if between else 0.5
    after = found[-1] - between[-1] if between else 0.5
    return np.array([found[0] - before, *between, found[-1] + after])


def shown_exits(L: int, most: int = _CURVES) -> list[int]:
    """Return at most `most` exits, evenly spread, the first and the last among them."""
    return sorted({round(E) for E in np.linspace(1, L, min(L, most))})


def _draw_curves(axes: Axes, log: LossLog, L: int) -> None:
    values: list[float] = []
    for E in shown_exits(L):
        color = depth_color(E, L)
        if (series := log.train.get(E)) is not None:
            thin = series.thinned(_POINTS)
            width = 2.2 if E == L else 1.2
            axes.plot(thin.steps, thin.losses, color=color, linewidth=width, label=f"E={E}")
            values += thin.losses.tolist()
        if (held := log.validation.get(E)) is not None:
            held = held.thinned(_POINTS // 10)
            axes.plot(held.steps, held.losses, "o", color=color, markersize=4.5)
            values += held.losses.tolist()
    if log.validation:
        axes.plot([], [], "o", color=INK, markersize=4.5, label="held out")
    low, high = within(values, 0.3)
    high = max(high, low + 1e-3 * (1.0 + abs(low)))
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.set(title="Loss over training", xlabel="optimizer step", ylabel="loss (nats per token)")
    light_grid(axes)


def run_styles(names: Sequence[str]) -> Mapping[str, tuple[str, str]]:
    """Return a colour and a marker for each run."""
    return {
        name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)
    }
