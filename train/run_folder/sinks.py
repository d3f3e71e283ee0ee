"""What a destination of metrics can take, and all of a run's destinations as one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from train.run_folder.events import State
from train.run_folder.heat_map import HeatMap
from train.run_folder.histogram import Histogram
from train.run_folder.writing import attempt


class Sink(Protocol):
    """A destination of metrics; any of its methods may raise anything."""

    @property
    def target(self) -> Path | str:
        """What it writes, for messages."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        ...

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write the histograms of one step."""
        ...

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write Markdown texts of one step."""
        ...

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Draw pictures of one step, each in place of the one before of its name."""
        ...

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Write what the run ended with, for a table of runs; nothing follows it."""
        ...


class Metrics:
    """All sinks of a run; none on ranks other than 0. One that fails leaves the others be."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of one step to every sink."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log, metrics, step))

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Send the histograms of one step to every sink."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_histograms, histograms, step))

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Send Markdown texts of one step to every sink."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_texts, texts, step))

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Send pictures of numbers that were logged too to every sink that shows pictures."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_heat_maps, maps, step))

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Send what the run ended with to every sink; nothing follows it."""
        for sink in self._sinks:
            attempt(sink.target, partial(sink.log_summary, values, state))
