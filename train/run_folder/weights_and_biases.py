"""Weights & Biases: online if that is possible at once, else on this machine, else not at all.

It is a guest: whatever its package, its key or the network does, it holds a run up for seconds.
"""

import html
import logging
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from train.run_folder.events import State
from train.run_folder.heat_map import HeatMap, picture_of
from train.run_folder.histogram import Histogram
from train.run_folder.within import FINISH_SECONDS, LOCAL_SECONDS, within
from train.run_folder.writing import reason_of, replace_file

Mode = Literal["online", "offline", "disabled", "shared"]

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 4.0
"""Longest wait for W&B's server to answer at all."""
ONLINE_SECONDS = 5.0
"""Longest wait for it to begin a run."""
# In a process of its own, which can be killed: W&B's own time limits do not hold.
_PROBE = "import wandb; print(flush=True); wandb.Api(timeout=3).viewer"


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a run is shown on W&B."""

    project: str
    entity: str = ""
    """The user or team; empty: the user's default."""
    group: str = ""
    """Runs to compare, as those of a sweep; empty: none."""
    tags: Sequence[str] = ()


class WeightsAndBiases:
    """One W&B run per run folder, continued when the run resumes."""

    def __init__(
        self, folder: Path, where: Where, config: dict[str, Any], *, name: str, mode: Mode
    ) -> None:
        """Start the W&B run of this name, its id, or continue it."""
        import wandb  # takes seconds, so only where it is used

        self.target = "wandb"
        self._histogram, self._image, self._html = wandb.Histogram, wandb.Image, wandb.Html
        self._run = wandb.init(
            project=where.project,
            entity=where.entity or None,
            group=where.group or None,
            tags=list(where.tags) or None,
            name=folder.name,
            id=name,
            resume="allow",
            dir=folder,
            config=config,
            mode=mode,
        )
        # Not W&B's own count of steps, which cannot decrease, as the run's does in a rollback.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        self._run.log({"step": step, **metrics})

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Log them all at once."""
        self._run.log(
            {"step": step}
            | {
                name: self._histogram(np_histogram=(h.counts, h.edges))
                for name, h in histograms.items()
            }
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Log them all at once, as their Markdown reads."""
        shown = {
            name: self._html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()
        }
        self._run.log({"step": step, **shown})

    def log_heat_maps(self, maps: Mapping[str, HeatMap], step: int) -> None:
        """Log them all at once, as images."""
        images = {name: self._image(picture_of(each)) for name, each in maps.items()}
        self._run.log({"step": step, **images})

    def log_summary(self, values: Mapping[str, float], state: State) -> None:
        """Write the values that W&B's table of runs compares."""
        self._run.summary.update({**values, "state": state})

    def close(self) -> None:
        """Send what is left, within FINISH_SECONDS; `wandb sync` sends what is not."""
        within(FINISH_SECONDS, self._run.finish)


def open_wandb(folder: Path, where: Where, config: dict[str, Any]) -> WeightsAndBiases | None:
    """Start the W&B run of a run folder: online, else offline, else None; a warning tells why.

    Its network is waited for at most ANSWER_SECONDS and ONLINE_SECONDS.

    Args:
        folder: The run folder.
        where: Project, user and group to log under.
        config: The configuration to show.
    """

    def start(mode: Mode, name: str) -> WeightsAndBiases:
        seconds = ONLINE_SECONDS if mode == "online" else LOCAL_SECONDS
        return within(
            seconds, lambda: WeightsAndBiases(folder, where, config, name=name, mode=mode)
        )

    try:
        with _ask_server() as probe:  # while the package is imported here
            mode = within(LOCAL_SECONDS, _configured_mode)
            online = mode == "online"
            reason = within(LOCAL_SECONDS, partial(_why_unreachable, probe)) if online else ""
        if reason:
            mode = "offline"
            _warn_offline(folder, reason)
        try:
            return start(mode, _run_id(folder / "wandb-id"))
        except Exception as error:  # whatever W&B raises
            if mode != "online" or isinstance(error, TimeoutError):
                raise
            _warn_offline(folder, reason_of(error))
        return start("offline", uuid.uuid4().hex)  # an id whose start has failed is in use
    except Exception as error:  # whatever a package raises, which may not even be W&B's
        file = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        logger.warning("wandb: left out, %s%s; training goes on", file, reason_of(error))
        return None


def _run_id(file: Path) -> str:
    """Return W&B's id of the run, which the file keeps over restarts."""
    name = file.read_text().strip() if file.exists() else ""
    if not name:  # new, or a start was killed before it had written it
        name = uuid.uuid4().hex
        replace_file(file, name.encode())
    return name


def _configured_mode() -> Mode:
    """Return the mode that W&B's environment and settings ask for."""
    import wandb

    mode: Mode = wandb.setup().settings.mode
    return mode


@contextmanager
def _ask_server() -> Iterator[subprocess.Popen[str]]:
    """Begin to ask W&B's server who this user is; the end of the `with` block ends that."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROBE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as probe:
        try:
            yield probe
        finally:
            probe.kill()


def _why_unreachable(probe: subprocess.Popen[str]) -> str:
    """Return why the server has not answered, or nothing."""
    assert probe.stdout is not None
    probe.stdout.readline()  # imported, or ended
    try:
        _, errors = probe.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer of its server within {ANSWER_SECONDS:.0f} s"
    return (errors.strip().splitlines() or ["no reason given"])[-1] if probe.returncode else ""


def _warn_offline(folder: Path, reason: str) -> None:
    logger.warning("wandb: offline, %s; `wandb sync` sends %s later", reason, folder / "wandb")
