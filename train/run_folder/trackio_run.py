"""Trackio: a run in a database on this machine, which `trackio show` opens; nothing is sent.

It is a guest, as W&B is: whatever its package does, it holds a run up for seconds.
"""

import contextlib
import io
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from train.run_folder.events import State
from train.run_folder.heat_map import HeatMap, picture_of
from train.run_folder.histogram import Histogram
from train.run_folder.within import FINISH_SECONDS, LOCAL_SECONDS, within
from train.run_folder.writing import reason_of, replace_file

logger = logging.getLogger(__name__)

START_SECONDS = 20.0
"""Longest wait for it to begin a run, or for its server where one is named in the environment."""


class TrackioRun:
    """One run of Trackio per run folder, continued when the run resumes."""

    def __init__(self, folder: Path, project: str, group: str, config: dict[str, Any]) -> None:
        """Start the run of this folder's name, or continue it."""
        import trackio  # takes seconds, so only where it is used

        self.target = "trackio"
        self._trackio, mark = trackio, folder / "trackio"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to show the runs
            self._run = trackio.init(
                project=project,
                name=folder.name,
                group=group or None,
                config=config,
                # A run of this name in another folder is another run.
                resume="allow" if mark.exists() else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        replace_file(mark, f"{project}/{folder.name}\n".encode())
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        self._log(metrics, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Log them all at once."""
        self._log(
            {
                name: self._trackio.Histogram(np_histogram=(h.counts, h.edges))
                for name, h in histograms.items()
            },
            step,
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Log them all at once, as Markdown."""
        self._log({name: self._trackio.Markdown(text) for name, text in texts.items()}, step)

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Log them all at once, as images."""
        images = {name: self._trackio.Image(picture_of(each)) for name, each in maps.items()}
        self._log(images, step)

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Log how the run ended; its table of runs takes the last point of every curve."""
        self._log({"state": self._trackio.Markdown(state)}, self._step)

    def close(self) -> None:
        """Write what is left, within FINISH_SECONDS."""
        with contextlib.redirect_stdout(io.StringIO()):
            within(FINISH_SECONDS, self._run.finish)

    def _log(self, values: Mapping[str, object], step: int) -> None:
        self._step = step
        self._run.log(dict(values), step=step)


def open_trackio(
    folder: Path, project: str, group: str, config: dict[str, Any]
) -> TrackioRun | None:
    """Start the Trackio run of a run folder, or None; a warning tells why.

    Args:
        folder: The run folder.
        project: Project to log under.
        group: Group of the run; empty: none.
        config: The configuration to show.
    """
    try:
        within(LOCAL_SECONDS, _import)
        run = within(START_SECONDS, partial(TrackioRun, folder, project, group, config))
    except ImportError:
        logger.warning("trackio: left out, it is not installed: pip install 'skipstone[trackio]'")
    except Exception as error:  # whatever a package raises
        logger.warning("trackio: left out, %s; training goes on", reason_of(error))
    else:
        logger.info("trackio: logs here, open it with: trackio show --project %s", project)
        return run
    return None


def _import() -> None:
    import trackio  # noqa: F401
