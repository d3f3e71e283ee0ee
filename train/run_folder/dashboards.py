"""What people watch, on every dashboard alike: charts by name, pictures, marks and settings.

TensorBoard, W&B and Trackio take what comes from here as it is. metrics.jsonl keeps its own names.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from train.run_folder.events import Event, State
from train.run_folder.heat_map import HeatMap
from train.run_folder.histogram import Histogram
from train.run_folder.pictures import Pictures
from train.run_folder.records import read_records
from train.run_folder.shown_names import shown
from train.run_folder.sinks import Metrics, Sink

FIRST_SECONDS = 100.0
"""Time from the start to the first pictures."""
COST_MULTIPLE = 100.0
"""Least time from pictures to the next, in times of what drawing them took: at most 1 % of it."""
GROWTH = 0.25
"""The same, as a share of the time since the start: few pictures of a run of weeks."""
MAX_MARKS = 50
"""Most marks in their table, the latest."""
MAX_BACKFILL = 1000
"""Most records that a dashboard begun late is given; TensorBoard shows no more of a curve."""


class Dashboards:
    """A sink that sends what people watch to every dashboard."""

    target = "dashboards"

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._all = Metrics(sinks)
        self._pictures = Pictures()
        self._marks: list[tuple[int, str]] = []
        self._last: dict[str, float] = {}
        self._step = 0
        self._began = time.monotonic()
        self._draw_at = self._began + FIRST_SECONDS

    def open(
        self,
        path: Path,
        events: Sequence[Event],
        done_steps: int,
        *,
        settings: str,
        late: Sequence[Sink] = (),
    ) -> None:
        """Go on from what the run has logged; show its settings, and where it was resumed.

        Args:
            path: metrics.jsonl.
            events: Of the whole run.
            done_steps: Steps done; later records are left out.
            settings: Markdown.
            late: Dashboards that lack the steps before, and are given their curves.
        """
        before = Metrics(late)
        every = -(-sum(1 for _ in _lines(path)) // MAX_BACKFILL) if late else 1
        earlier = (each for each in read_records(_lines(path)) if each[0] <= done_steps)
        for i, (step, metrics) in enumerate(earlier):
            charts = self._take(metrics, step)
            if i % every == 0:
                before.log(charts, step)
        self._marks = sorted(self._marks + [mark for event in events for mark in _marks_of(event)])
        self._all.log_texts({"settings": settings}, done_steps)
        self._show_marks(done_steps)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the charts of one step, and draw the pictures if that is due."""
        marks = len(self._marks)
        self._all.log(self._take(metrics, step), step)
        if len(self._marks) > marks:
            self._show_marks(step)
        if time.monotonic() >= self._draw_at:
            self._draw()

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Log the histograms of one step."""
        self._all.log_histograms(
            {name.replace("adam/", "updates/"): each for name, each in histograms.items()}, step
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Log the texts of one step."""
        self._all.log_texts(texts, step)

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Log pictures of one step."""
        self._all.log_heat_maps(maps, step)

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Draw the last pictures, and log what the run ended with."""
        if state == "finished":  # a run that is to make room for another ends at once
            self._draw()
        if values:
            self._all.log(values, self._step)
        self._all.log_summary({**self._last, **values}, state)

    def _take(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Return the charts of one record, and keep what pictures and marks are made of."""
        self._pictures.add(metrics, step)
        charts, before = shown(metrics), self._last
        rows, rows_before = (each.get("marks/batch_size") for each in (charts, before))
        if rows_before is not None and rows is not None and rows != rows_before:
            self._marks.append((step, f"batch of {rows_before:.0f} becomes {rows:.0f}"))
        trained = charts.get("loss/train", before.get("loss/train"))
        if trained is not None and "loss/held_out" in charts:
            losses = trained, charts["loss/held_out"]
            charts |= {"margin/low": min(losses), "margin/high": max(losses)}
        self._last, self._step = before | charts, step
        return charts

    def _show_marks(self, step: int) -> None:
        if self._marks:
            lines = [f"| {at} | {text} |" for at, text in self._marks[-MAX_MARKS:]]
            self._all.log_texts(
                {"marks": "\n".join(["| step | what happened |", "|---|---|", *lines])}, step
            )

    def _draw(self) -> None:
        began = time.monotonic()
        self._all.log_heat_maps(self._pictures.draw(), self._step)
        now = time.monotonic()
        self._draw_at = now + max(COST_MULTIPLE * (now - began), GROWTH * (now - self._began))


def _marks_of(event: Event) -> Iterator[tuple[int, str]]:
    """Yield (step, text) for an event that curves show."""
    step = event["step"]
    if event["kind"] == "start" and step > 0:
        ranks = event.get("world_size", "?")
        yield step, f"resumed on {ranks} rank{'' if ranks == 1 else 's'}"
    elif event["kind"] == "rollback":
        yield step, f"rolled back to step {event.get('to', '?')}: {event.get('reason', '?')}"


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with path.open("rb") as file:
            yield from file
