"""The quality of every exit on held-out text, of several runs side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from inference.evaluation.exit_quality import ExitQuality
from inference.report_page.drawing import (
    BLUE,
    GREEN,
    VERMILLION,
    Picture,
    drawn,
    exit_ticks,
    light_grid,
)
from inference.report_page.page import Section, figure, note, source_line, table
from inference.report_page.source import Source, number
from inference.report_page.training import run_styles
from inference.report_page.visible import safe


@dataclass(frozen=True)
class RunExits:
    """The exits of a run; without them, why."""

    name: str
    exits: Sequence[ExitQuality]
    tokens: int
    source: Source | None
    missing: str = ""


def exits_section(runs: Sequence[RunExits]) -> Section:
    """Return the quality of the exits, the first run's in full."""
    title = "Quality of every exit"
    missing = "".join(note(f"{run.name}: {run.missing}") for run in runs if run.missing)
    known = [run for run in runs if run.exits]
    if not known:
        return Section("exits", title, missing)
    first = known[0]
    assert first.source is not None
    L = len(first.exits)
    picture = drawn(
        Picture(
            "exits",
            "Held-out loss by exit, and agreement, accuracy and confidence by exit",
            lambda figure: _draw(figure, known),
            (9.4, 3.6),
        )
    )
    caption = (
        "<b>Left:</b> held-out loss after E layers. <b>Right:</b> of "
        f"{safe(first.name)}, the share of positions where an exit's most probable token is the "
        "last layer's (agreement) or the text's own (accuracy), and the mean probability of "
        f"that token (confidence). {first.tokens:,} tokens, read once, no repeats."
    )
    others = "".join(source_line(run.source) for run in known[1:] if run.source)
    header = ["E", "loss<br>(nats/token)", "perplexity", "bits<br>per byte", "accuracy"]
    header += ["agreement", "confidence", "calibration<br>error (ECE)"]
    rows = [
        [f"{q.E}", number(q.loss, ".4f"), number(q.perplexity, ",.2f")]
        + [number(q.bits_per_byte, ".4f"), number(q.accuracy, ".1%"), number(q.agreement, ".1%")]
        + [number(q.confidence, ".1%"), number(q.calibration_error, ".3f")]
        for q in first.exits
    ]
    body = figure(picture, caption, first.source) + others
    body += (
        table(header, rows, caption=f"{safe(first.name)}, exits of {L} layer{'s' * (L > 1)}")
        + missing
    )
    return Section("exits", title, body, (picture,))


def _draw(figure: Figure, runs: Sequence[RunExits]) -> None:
    left, right = figure.subplots(1, 2)
    styles = run_styles([run.name for run in runs])
    for run in runs:
        color, marker = styles[run.name]
        losses = [q.loss for q in run.exits]
        E = [q.E for q in run.exits]
        size = 5.0 if len(E) <= 16 else 3.0
        left.plot(E, losses, color=color, marker=marker, markersize=size, label=run.name[:40])
    left.set(title="Held-out loss", ylabel="loss (nats per token)")
    if len(runs) > 1:
        left.legend()
    exits = runs[0].exits
    E = [q.E for q in exits]
    size = 5.0 if len(E) <= 16 else 3.0
    for values, label, color, marker in (
        ([q.agreement for q in exits], "agreement", BLUE, "o"),
        ([q.accuracy for q in exits], "accuracy", GREEN, "s"),
        ([q.confidence for q in exits], "confidence", VERMILLION, "^"),
    ):
        right.plot(E, values, color=color, marker=marker, markersize=size, label=label)
    right.set(
        title=f"Agreement with the last layer ({runs[0].name[:24]})", ylabel="share of positions"
    )
    right.set_ylim(0.0, 1.03)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend()
    for axes, L in ((left, max(len(run.exits) for run in runs)), (right, len(exits))):
        axes.set_xlabel("E, layers run before the exit")
        exit_ticks(axes.xaxis, L)
        light_grid(axes)
