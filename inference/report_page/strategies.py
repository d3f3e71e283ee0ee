"""Strategies on the plane of quality and speed, and how the drafts of each went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from inference.report_page.drawing import (
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Picture,
    drawn,
    light_grid,
)
from inference.report_page.measurements import Arm, Arms, short_names
from inference.report_page.page import Section, figure, note, table
from inference.report_page.source import number
from inference.report_page.visible import safe, visible

_KINDS = {"autoregressive": (GREY, "s"), "self_speculative": (BLUE, "o"), "dynamic": (GREEN, "D")}
_STEPS = (9, -9, 18, -18, 27, -27, 36, -36)
"""How far above or below its point a number may stand, in points of print."""
_ANNOTATED = 12
_LOSSY = (VERMILLION, "^")
_STOPS = {
    "whole": ("accepted whole", GREEN),
    "leaf": ("a leaf taken", SKY),
    "not_sure": ("its stop rule", BLUE),
    "rejected": ("a token rejected", VERMILLION),
    "end": ("the text ended", ORANGE),
    "limit": ("the row's limit", PURPLE),
}


def strategies_section(arms: Arms | None, missing: str) -> Section:
    """Return every strategy's speed and quality."""
    title = "Strategies: quality and speed"
    if arms is None:
        return Section("strategies", title, note(missing))
    picture = drawn(
        Picture(
            "strategies",
            "Speedup of each strategy with its range, and quality over speedup",
            lambda figure: _draw(figure, arms),
            (9.4, max(3.6, 1.3 + 0.33 * len(arms.arms))),
        )
    )
    spread = "Bars: least and most of the repeats. " if arms.repeats > 1 else "One run, no spread. "
    caption = (
        "<b>Left:</b> speedup over plain decoding in the same repeat, the median; the tick is the "
        f"bound for the arm's agreement. {spread}<b>Right:</b> the same strategies by number on "
        f"the plane of speed and quality ({safe(arms.measure)}); lossless ones have the tokens of "
        "plain decoding."
    )
    body = figure(picture, caption, arms.source) + _doubt(arms) + _table(arms)
    return Section("strategies", title, body, (picture,))


def _doubt(arms: Arms) -> str:
    """Return a line where plain decoding itself took very different times."""
    if not arms.is_doubtful:
        return ""
    speeds = arms.arms[0].speeds
    spread = f"{min(speeds):,.0f} to {max(speeds):,.0f} tokens/s"
    return note(
        f"Plain decoding alone ran at {spread} in the repeats: the machine was busy, and so "
        "wide are the ranges. Measure again on a quiet one."
    )


def _table(arms: Arms) -> str:
    header = ["strategy", "tokens/s", "speedup", "range", "layers<br>per token", "accepted"]
    header += ["agreement", "bound", "full<br>choice", "ln p", *map(safe, arms.arms[0].scores)]
    names = short_names([arm.settings for arm in arms.arms])
    rows = [
        [f"<code{_whole(a, names)}>{i} {safe(names[a.settings])}{_batch(a, arms)}</code>"]
        + [number(a.tokens_per_second, ",.1f"), number(a.speedup, ".2f", "x"), _range(a.speedups)]
        + [number(a.layers_per_token, ".2f"), number(a.acceptance_rate, ".1%")]
        + [number(a.agreement, ".3f"), number(a.bound, ".2f", "x"), number(a.full_choice, ".1%")]
        + [number(a.log_likelihood, ".3f"), *(number(s, ".3f") for s in a.scores.values())]
        for i, a in enumerate(arms.arms, start=1)
    ]
    caption = (
        "full choice: tokens that the full model finds most probable; ln p: log likelihood under "
        "it, nats per token; accepted: drafted tokens the text got; ...: settings that were "
        "measured, shown where a name is pointed at"
    )
    return table(header, rows, caption=caption)


def _whole(arm: Arm, names: Mapping[str, str]) -> str:
    """Return what shows a strategy's whole text, where its name leaves out what was measured."""
    short = names[arm.settings].endswith("...")
    return f' tabindex="0" title="{safe(arm.settings, 1000)}"' if short else ""


def _batch(arm: Arm, arms: Arms) -> str:
    several = len({a.batch_size for a in arms.arms}) > 1
    return f", batch {arm.batch_size}" if several else ""


def _range(values: Sequence[float]) -> str:
    if min(values) == max(values):
        return "\N{EN DASH}"
    return f"{min(values):.2f}\N{EN DASH}{max(values):.2f}"


def _draw(figure: Figure, arms: Arms) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    names = short_names([arm.settings for arm in arms.arms])
    for i, arm in enumerate(arms.arms):
        color, marker = _KINDS.get(arm.strategy, _LOSSY)
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "capsize": 3,
            "linestyle": "none",
        }
        left.errorbar([arm.speedup], [i], xerr=arm.spread, **style)
        if arm.bound is not None:
            left.plot([arm.bound] * 2, [i - 0.3, i + 0.3], color=MUTED, linewidth=2.0)
        right.errorbar([arm.speedup], [arm.quality], xerr=arm.spread, **style)
    if any(arm.bound is not None for arm in arms.arms):
        left.plot([], [], color=MUTED, linewidth=2.0, label="bound for its agreement")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center")
    labels = [
        f"{visible(names[a.settings])[:52]}{_batch(a, arms)}  {i}"
        for i, a in enumerate(arms.arms, start=1)
    ]
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.axvline(1.0, color=MUTED, linewidth=1.0)
    left.set(title="Speedup, median and range", xlabel="speedup over plain decoding")
    light_grid(left, axis="x")
    right.axvline(1.0, color=MUTED, linewidth=1.0)
    right.set(title="Quality and speed", xlabel="speedup over plain decoding")
    right.set_ylabel(visible(arms.measure)[:60])
    if all(0.0 <= arm.quality <= 1.0 for arm in arms.arms):
        right.yaxis.set_major_locator(FixedLocator([*np.linspace(0.0, 1.0, 11)]))
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.margins(0.12, 0.2)
    light_grid(right)
    _number_points(figure, right, arms)


def _number_points(figure: Figure, axes: Axes, arms: Arms) -> None:
    """Write each arm's number by its point, where no other number is yet."""
    figure.draw_without_rendering()
    taken: list[tuple[float, float]] = []
    for i, arm in sorted(enumerate(arms.arms, start=1), key=lambda pair: pair[1].speedup):
        x, y = axes.transData.transform((arm.speedup, arm.quality)) * 72.0 / figure.dpi
        for step in _STEPS:
            near = (abs(x - a) < 11.0 and abs(y + step - b) < 8.5 for a, b in taken)
            if not any(near):
                break
        taken.append((x, y + step))
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(str(i), (arm.speedup, arm.quality), (0, step), fontsize=7.5, **style)


def drafts_section(arms: Arms | None, missing: str) -> Section:
    """Return how drafts went: accepted by position, and why no more were."""
    title = "Acceptance by draft position and by reason of stop"
    drafting = [a for a in arms.arms if sum(a.drafts.drafted_at)] if arms else []
    if arms is None or not drafting:
        return Section("drafts", title, note(missing or "No measured strategy drafts tokens."))
    picture = drawn(
        Picture(
            "drafts",
            "Share of drafted tokens accepted at each position, and why no more were accepted",
            lambda figure: _draw_drafts(figure, drafting),
            (9.4, 1.5 + 0.42 * len(drafting)),
        )
    )
    caption = (
        "<b>Left:</b> of the tokens drafted at a position, the share that was accepted, and its "
        "95 % interval (Wilson); a token counts as rejected if one before it was. "
        "<b>Right:</b> why a round accepted no more of its draft, share of rounds that drafted. "
        "Counts of the first repeat; greedy tokens are the same in all."
    )
    return Section("drafts", title, figure(picture, caption, arms.source), (picture,))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson, 1927)."""
    z, p = 1.959964, hits / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


def _draw_drafts(figure: Figure, arms: Sequence[Arm]) -> None:
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1.0))
    _draw_positions(left, arms)
    _draw_stops(figure, right, arms)
    names = short_names([arm.settings for arm in arms])
    left.set_yticks(range(len(arms)), [visible(names[arm.settings])[:52] for arm in arms])
    left.set_ylim(len(arms) - 0.5, -0.5)
    for axes in (left, right):
        axes.tick_params(length=0)


def _draw_positions(axes: Axes, arms: Sequence[Arm]) -> None:
    """Draw a cell for each strategy and position: the share, and its interval below."""
    most = max(len(arm.drafts.drafted_at) for arm in arms)
    cells = np.full((len(arms), most), np.nan)
    for y, arm in enumerate(arms):
        for x, (hits, trials) in enumerate(
            zip(arm.drafts.accepted_at, arm.drafts.drafted_at, strict=True)
        ):
            if 0 <= hits <= trials and trials:
                cells[y, x] = hits / trials
                if most <= _ANNOTATED:
                    _write_share(axes, x + 1, y, hits, trials)
    extent = (0.5, most + 0.5, len(arms) - 0.5, -0.5)
    style: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0, "aspect": "auto"}
    axes.imshow(cells, extent=extent, interpolation="none", **style)
    axes.set(title="Accepted, by position in the draft", xlabel="position in the draft")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)


def _write_share(axes: Axes, x: int, y: int, hits: int, trials: int) -> None:
    low, high = (100 * share for share in wilson(hits, trials))
    ink = "#000000" if hits / trials > 0.55 else "#ffffff"
    style: dict[str, Any] = {"ha": "center", "color": ink}
    axes.text(x, y, f"{hits / trials:.0%}", va="bottom", fontsize=8, **style)
    interval = f"{low:.0f}\N{EN DASH}{high:.0f}"
    axes.text(x, y + 0.06, interval, va="top", fontsize=6.5, **style)


def _draw_stops(figure: Figure, axes: Axes, arms: Sequence[Arm]) -> None:
    for y, arm in enumerate(arms):
        total, start = sum(max(0, n) for n in arm.drafts.stops.values()), 0.0
        for hatch, (reason, (_, color)) in zip(HATCHES, _STOPS.items(), strict=True):
            share = max(0, arm.drafts.stops.get(reason, 0)) / total if total else 0.0
            style: dict[str, Any] = {"color": color, "height": 0.66, "edgecolor": "#ffffff"}
            axes.barh(y, share, left=start, linewidth=0.4, hatch=hatch, **style)
            start += share
    for hatch, (reason, (label, color)) in zip(HATCHES, _STOPS.items(), strict=True):
        if any(arm.drafts.stops.get(reason) for arm in arms):
            axes.barh([0], [0], color=color, hatch=hatch, edgecolor="#ffffff", label=label)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(labelleft=False)
    axes.set(title="Why no more were accepted", xlabel="share of the rounds that drafted")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=6)
