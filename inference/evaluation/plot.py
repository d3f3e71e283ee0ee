"""The pictures: loss at every exit; speed, agreement and quality of the arms of a benchmark."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.output_streams import naming_the_file
from inference.evaluation.arm_result import ArmResult
from inference.evaluation.measurement import AUTOREGRESSIVE
from inference.evaluation.report import short_names

_COLORS = {"autoregressive": "0.6", "early_exit": "tab:orange", "self_speculative": "tab:blue"}
_OTHER_COLORS = [f"tab:{color}" for color in ("green", "red", "purple", "brown", "pink", "olive")]
_LABEL_WIDTH = 18
"""Characters in a line under a bar."""


def write_exit_plot(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw one curve of held-out loss by exit for each run, and write the picture to `path`.

    Args:
        path: A PNG file.
        curves: By run name, the loss in nats per token of the exits E = 1, 2, ...
    """
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, marker="o", label=name)
    axes.set_xlabel("E, layers run before the exit")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def write_plot(
    path: Path, results: Sequence[ArmResult], agreement: Sequence[float], title: str
) -> None:
    """Draw a benchmark, in as many panels as there are data for, and write the picture to `path`.

    Args:
        path: A PNG file.
        results: The arms, of all batch sizes.
        agreement: By E - 1, share of tokens where the exit predicts the last layer's.
        title: Of the whole.
    """
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _draw_speedups(axes, results),
        lambda axes: _draw_agreement(axes, agreement),
        lambda axes: _draw_quality(axes, results),
    ]
    grid = [r for r in results if r.strategy == "self_speculative" and r.bound is not None]
    if len({r.E for r in grid}) > 1 and len({r.d for r in grid}) > 1:
        panels.append(lambda axes: _draw_grid(axes, grid))
    rows = len(panels) // 2  # below the speedups, two panels in each
    figure = Figure(figsize=(max(8.0, 1.5 + 0.9 * len(results)), 4.0 + 3.5 * rows))
    figure.set_layout_engine("constrained")
    grid_spec = figure.add_gridspec(1 + rows, 2)
    panels[0](figure.add_subplot(grid_spec[0, :]))
    for i, draw in enumerate(panels[1:]):
        draw(figure.add_subplot(grid_spec[1 + i // 2, i % 2]))
    figure.suptitle(title, fontsize="medium")
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with naming_the_file("plot", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _draw_speedups(axes: Axes, results: Sequence[ArmResult]) -> None:
    """Draw one numbered bar for each arm, the range of its repeats and a mark at its bound.

    The base's range is that of its tokens/s over their median. A lossy arm decodes other tokens:
    its bar is a speed, not a quality.
    """
    colors = _colors(results)
    for x, result in enumerate(results):
        bar = axes.bar(x, result.speedup, color=colors[result.strategy])
        axes.bar_label(bar, fmt="%.2f", label_type="center")
        spread = result.speedups
        if result.strategy == AUTOREGRESSIVE.name:
            spread = [speed / result.tokens_per_second for speed in result.speeds]
        axes.vlines(x, min(spread), max(spread), color="black")
        if result.bound is not None:
            axes.plot([x - 0.4, x + 0.4], [result.bound] * 2, color="black", linestyle="--")
    if any(result.bound is not None for result in results):
        axes.plot([], [], color="black", linestyle="--", label="bound for its agreement")
        axes.legend()
    axes.set_xticks(range(len(results)), arm_labels(results), fontsize="small")
    axes.set_ylabel("speedup over autoregressive\n(median and range of repeats)")
    axes.margins(y=0.15)


def _draw_grid(axes: Axes, results: Sequence[ArmResult]) -> None:
    """Draw the speedup of self-speculation over E, one line for each d and batch size."""
    for d, batch_size in sorted({(r.d or 0, r.batch_size) for r in results}):
        line = [r for r in results if (r.d, r.batch_size) == (d, batch_size)]
        line.sort(key=lambda r: r.E or 0)
        label = f"d={d}, batch {batch_size}"
        axes.plot([r.E or 0 for r in line], [r.speedup for r in line], marker="o", label=label)
    axes.axhline(1.0, color="0.6")
    axes.set_xlabel("E, layers that draft")
    axes.set_ylabel("speedup of self_speculative\nover autoregressive")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")


def _draw_agreement(axes: Axes, agreement: Sequence[float]) -> None:
    axes.plot(range(1, len(agreement) + 1), agreement, marker="o")
    axes.set_xlabel("E, layers run before the exit")
    axes.set_ylabel("agreement with the last layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0.0, 1.05)
    axes.grid(alpha=0.3)


def _draw_quality(axes: Axes, results: Sequence[ArmResult]) -> None:
    """Draw a task's first measure, or the likelihood of what was written, over layers per token."""
    measure = next(iter(results[0].scores), None)
    colors = _colors(results)
    for name, color in colors.items():
        arms = [(number, r) for number, r in enumerate(results, start=1) if r.strategy == name]
        layers = [r.layers_per_token for _, r in arms]
        quality = [r.log_likelihood if measure is None else r.scores[measure] for _, r in arms]
        axes.scatter(layers, quality, color=color, label=name)
        numbers: dict[tuple[float, float], list[str]] = {}
        for (number, _), *point in zip(arms, layers, quality, strict=True):
            numbers.setdefault((point[0], point[1]), []).append(str(number))
        for at, here in numbers.items():
            text = ", ".join(here)
            axes.annotate(text, at, (3, 3), textcoords="offset points", fontsize="x-small")
    axes.set_xlabel("layers computed per token")
    axes.set_ylabel(measure or "log likelihood under the full\nmodel (nats per token)")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _colors(results: Sequence[ArmResult]) -> dict[str, str]:
    names = dict.fromkeys(result.strategy for result in results)
    others = [name for name in names if name not in _COLORS]
    colors = _COLORS | dict(zip(others, cycle(_OTHER_COLORS), strict=False))
    return {name: colors[name] for name in names}


def arm_labels(results: Sequence[ArmResult]) -> list[str]:
    """Return what stands under the bars: an arm's number, name, settings, and batch size."""
    names = short_names([result.settings for result in results])
    batches = len({result.batch_size for result in results}) > 1
    found = []
    for number, result in enumerate(results, start=1):
        name, *settings = names[result.settings].split(":")
        lines = [line for setting in settings for line in wrap(setting, _LABEL_WIDTH)]
        batch = [f"batch {result.batch_size}"] if batches else []
        found.append("\n".join([str(number), name.replace("_", "\n"), *lines, *batch]))
    return found
