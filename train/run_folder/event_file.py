"""TensorBoard's event files, appended to without a thread: a failure is raised where it happens.

torch's SummaryWriter hands events to a thread that dies of its first error, prints a traceback, and
never writes again.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import histogram_raw, scalar

from train.run_folder.board_layout import layout, session_end, session_start
from train.run_folder.events import State
from train.run_folder.heat_map import HeatMap, png_of
from train.run_folder.histogram import Histogram
from train.run_folder.writing import GrowingFile

_PREFIX = "events.out.tfevents."
_numbers = itertools.count()


class TensorBoard:
    """A run of TensorBoard, named by the run folder: its event files lie there."""

    def __init__(self, folder: Path, done_steps: int, config: dict[str, Any]) -> None:
        """Name the event file; points after step `done_steps` of earlier ones are purged."""
        self._step, purge = done_steps, done_steps + 1
        speculates = bool(config.get("speculation", {}).get("interval_steps"))
        head = [
            Event(file_version="brain.Event:2", step=purge),
            Event(session_log=SessionLog(status=SessionLog.START), step=purge),
            Event(summary=layout(config["model"]["n_layers"], speculates=speculates)),
            Event(summary=session_start(config)),
        ]
        # In order of time, which is how TensorBoard reads the files of a folder.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.target = folder / f"{_PREFIX}{name}"
        self._file = GrowingFile(self.target, _records(head))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to every curve."""
        self._append((scalar(name, value) for name, value in metrics.items()), step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Add one slice to every histogram."""
        self._append((_summary(name, each) for name, each in histograms.items()), step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Add one entry under each name of Text."""
        self._append((text_pb(name, each) for name, each in texts.items()), step)

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Add one picture under each name of Images."""
        self._append((_picture(name, each) for name, each in maps.items()), step)

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """End the session of HParams, whose table takes the last point of every curve."""
        self._append(session_end(state), self._step)

    def _append(self, summaries: Iterable[Summary], step: int) -> None:
        self._step = step
        values = [value for summary in summaries for value in summary.value]
        self._file.append(_records([Event(summary=Summary(value=values), step=step)]))


def has_event_files(folder: Path) -> bool:
    """Whether a run folder has curves of TensorBoard; those of older runs lie a folder deeper."""
    return any(folder.glob(f"{_PREFIX}*"))


def _summary(name: str, histogram: Histogram) -> Summary:
    counts = np.array(histogram.counts)
    edges = histogram.edges
    middles = (edges[1:] + edges[:-1]) / 2
    return histogram_raw(
        name,
        min=histogram.low,
        max=histogram.high,
        num=int(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
    )


def _picture(name: str, heat_map: HeatMap) -> Summary:
    image = Summary.Image(encoded_image_string=png_of(heat_map))
    return Summary(value=[Summary.Value(tag=name, image=image)])


def _records(events: Iterable[Event]) -> bytes:
    """Return events as they are in a file."""
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return buffer.getvalue()
