"""The pictures: speedup of each arm with its bound, and loss at every exit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference.measurement import ArmResult

_COLORS = {"autoregressive": "0.6", "early_exit": "tab:orange", "self_speculative": "tab:blue"}


def write_exit_plot(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw one curve of held-out loss by exit for each run, and write the picture to `path`.

    Args:
        path: A PNG file.
        curves: By run name, the loss in nats per token of the exits l = 0, 1, ...
    """
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, marker="o", label=name)
    axes.set_xlabel("E, layers run before the exit")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_plot(path: Path, results: Sequence[ArmResult], title: str) -> None:
    """Draw one bar for each arm and a mark at its bound, and write the picture to `path`.

    Early exit's tokens are other tokens: its bar says how fast they come, not how good they are.
    """
    figure = Figure(figsize=(1.5 + 0.9 * len(results), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for x, result in enumerate(results):
        bar = axes.bar(x, result.speedup, color=_COLORS.get(result.strategy, "tab:green"))
        axes.bar_label(bar, fmt="%.2f", label_type="center")
        if result.bound is not None:
            axes.plot([x - 0.4, x + 0.4], [result.bound] * 2, color="black", linestyle="--")
    axes.plot([], [], color="black", linestyle="--", label="bound for its acceptance")
    axes.set_xticks(range(len(results)), [_label(result) for result in results])
    axes.set_ylabel("speedup over autoregressive")
    axes.set_title(title, fontsize="medium")
    axes.margins(y=0.15)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _label(result: ArmResult) -> str:
    settings = [f"{name}={value}" for name, value in (("E", result.E), ("d", result.d)) if value]
    return "\n".join([result.strategy.replace("_", "\n"), *settings])
