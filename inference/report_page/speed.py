"""Speed over E and d with its bound, and where the time of a round goes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from inference.engine.counters import speedup_bound
from inference.evaluation.costs import Costs
from inference.evaluation.prediction import Prediction
from inference.report_page.drawing import (
    BLUE,
    GREY,
    HATCHES,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Picture,
    drawn,
    light_grid,
)
from inference.report_page.measurements import Arms, Tuning, short_names
from inference.report_page.page import Section, figure, note
from inference.report_page.visible import visible

_PARTS = {
    "draft": ("layers that draft", BLUE),
    "verify": ("layers that verify", SKY),
    "head": ("LM head", ORANGE),
    "overhead": ("the rest of a round", PURPLE),
}
_ANNOTATED = 120
"""Most cells with a number in each."""


def speed_section(tuning: Tuning | None, arms: Arms | None, missing: str) -> Section:
    """Return the speedup of self-speculation over E and d."""
    title = "Speed over E and d"
    if tuning is None:
        return Section("speed", title, note(missing))
    picture = drawn(
        Picture(
            "speed",
            "Predicted speedup over plain decoding for every E and d, and of each E with its bound",
            lambda figure: _draw(figure, tuning, arms),
            (9.4, 3.9),
        )
    )
    best = tuning.predictions[0]
    caption = (
        "<b>Left:</b> speedup of self-speculation over plain decoding, predicted from the costs of "
        "passes and from where exits agree with the last layer; 1.00 is plain decoding, the frame "
        f"is the best: E={best.E}, d={best.d}. <b>Right:</b> the best d of each E, its bound (a "
        "verification as cheap as one step: Leviathan et al., theorem 3.8), and what was measured, "
        "median and range of the repeats."
    )
    return Section("speed", title, figure(picture, caption, tuning.source), (picture,))


def bound_of(prediction: Prediction, costs: Costs) -> float:
    """Return the best speedup for the agreement and the draft cost of a prediction."""
    a = min(1.0, max(0.0, prediction.agreement))
    return speedup_bound(a, prediction.d, max(0.0, costs.draft[prediction.E - 1]))


def _draw(figure: Figure, tuning: Tuning, arms: Arms | None) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
    _draw_heat(figure, left, tuning.predictions)
    _draw_bounds(right, tuning, arms)


def _draw_heat(figure: Figure, axes: Axes, predictions: Sequence[Prediction]) -> None:
    most_E, most_d = max(p.E for p in predictions), max(p.d for p in predictions)
    cells = np.full((most_d, most_E), np.nan)
    for p in predictions:
        cells[p.d - 1, p.E - 1] = p.speedup
    octaves = np.log2(np.clip(cells, 1 / 16, 16.0))
    image = axes.imshow(
        octaves,
        cmap="PuOr_r",
        norm=CenteredNorm(halfrange=max(0.25, float(np.nanmax(np.abs(octaves))))),
        interpolation="none",
        aspect="auto",
        origin="lower",
        extent=(0.5, most_E + 0.5, 0.5, most_d + 0.5),
    )
    best = predictions[0]
    at = best.E - 0.5, best.d - 0.5
    axes.add_patch(Rectangle(at, 1.0, 1.0, fill=False, edgecolor="#000000", linewidth=1.8))
    if cells.size <= _ANNOTATED:
        for p in predictions:
            red, green, blue, _ = image.cmap(image.norm(octaves[p.d - 1, p.E - 1]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
            axes.text(p.E, p.d, f"{p.speedup:.2f}", color="#ffffff" if dark else "#000000", **style)
    axes.set(title="Predicted speedup over plain decoding", ylabel="d, tokens drafted")
    axes.set_xlabel("E, layers that draft")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_formatter(lambda octave, _: f"{2.0**octave:.2g}x")
    bar.outline.set_visible(False)


def _draw_bounds(axes: Axes, tuning: Tuning, arms: Arms | None) -> None:
    best = {p.E: p for p in reversed(tuning.predictions)}
    exits = sorted(best)
    bounds = [max(bound_of(p, tuning.costs) for p in tuning.predictions if p.E == E) for E in exits]
    axes.axhline(1.0, color=MUTED, linewidth=1.0)
    axes.plot(exits, bounds, color=GREY, linestyle="--", label="bound, best d")
    speedups = [best[E].speedup for E in exits]
    axes.plot(exits, speedups, color=BLUE, marker="o", label="predicted, best d")
    for p in (best[E] for E in exits if len(exits) <= 16):
        text: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "fontsize": 7.5,
            "color": MUTED,
        }
        axes.annotate(f"d={p.d}", (p.E, p.speedup), (0, -12), **text)
    plain = [a for a in arms.arms if a.E and a.bound is not None] if arms else []
    for i, arm in enumerate(plain):
        assert arm.E is not None
        label = "measured" if i == 0 else None
        style: dict[str, Any] = {
            "color": VERMILLION,
            "marker": "D",
            "capsize": 3,
            "linestyle": "none",
        }
        axes.errorbar([arm.E], [arm.speedup], arm.spread, label=label, **style)
        axes.annotate(
            f"d={arm.d}",
            (arm.E, arm.speedup),
            (7, -3),
            textcoords="offset points",
            fontsize=7.5,
            color=VERMILLION,
        )
    axes.set(title="Best speedup of each E, and its bound", xlabel="E, layers that draft")
    axes.set_ylabel("speedup over plain decoding")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.14)
    light_grid(axes)
    axes.legend()


def rounds_section(tuning: Tuning | None, missing: str) -> Section:
    """Return where the time of measured rounds goes."""
    title = "Where a round's time goes"
    rounds = {} if tuning is None else _readable(tuning.rounds)
    if tuning is None or not rounds:
        return Section("rounds", title, note(missing or "No strategy with rounds was measured."))
    picture = drawn(
        Picture(
            "rounds",
            "Stacked bars of the time of a round by its parts, for each strategy, in full steps",
            lambda figure: _draw_rounds(figure, rounds),
            (9.4, 1.5 + 0.36 * len(rounds)),
        )
    )
    caption = (
        "Time of a round by its parts, in full steps of one token "
        f"({tuning.costs.full_step_seconds * 1e3:.2f} ms here). The mark is what the round's "
        "tokens are worth in plain decoding: a round that ends before its mark is faster. The "
        "rest is below 0 where passes one after the other take less time than each alone."
    )
    return Section("rounds", title, figure(picture, caption, tuning.source), (picture,))


def _readable(rounds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the rounds that have every part, all numbers finite and not beyond a picture."""
    return {
        text: dict(row)
        for text, row in rounds.items()
        if row.keys() >= {"worth", "took", *_PARTS} and all(abs(v) < 1e6 for v in row.values())
    }


def _draw_rounds(figure: Figure, rounds: Mapping[str, Mapping[str, float]]) -> None:
    axes = figure.subplots()
    names = short_names([*rounds])
    for y, row in enumerate(rounds.values()):
        right = left = 0.0
        for hatch, (part, (_, color)) in zip(HATCHES, _PARTS.items(), strict=False):
            value = row[part]
            start = right if value >= 0 else left
            style: dict[str, Any] = {
                "color": color,
                "height": 0.62,
                "hatch": hatch,
                "edgecolor": "#ffffff",
            }
            axes.barh(y, value, left=start, linewidth=0.4, **style)
            right, left = right + max(0.0, value), left + min(0.0, value)
        axes.plot([row["worth"]] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=2.2)
        end = max(right, row["worth"])
        axes.annotate(
            f"{row['worth'] / row['took']:.2f}x" if row["took"] > 0 else "",
            (end, y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for hatch, (label, color) in zip(HATCHES, _PARTS.values(), strict=False):
        axes.barh([0], [0], color=color, hatch=hatch, edgecolor="#ffffff", label=label)
    axes.plot([], [], color=INK, linewidth=2.2, label="worth of its tokens")
    axes.set_yticks(range(len(rounds)), [visible(names[text])[:60] for text in rounds])
    axes.invert_yaxis()
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    axes.set(
        xlabel="full steps of one token", title="Time of a round, and what its tokens are worth"
    )
    axes.margins(x=0.08)
    light_grid(axes, axis="x")
    figure.legend(loc="outside lower center", ncols=5)
