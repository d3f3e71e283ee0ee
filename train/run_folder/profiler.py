"""A trace of a few steps by torch's profiler, and on GPUs their memory, into the run folder.

Off unless asked for. A trace opens in ui.perfetto.dev, chrome://tracing and TensorBoard's profile
plugin, a snapshot of memory in pytorch.org/memory_viz. A write that fails costs the trace alone.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from train.monitoring.sections import Sections
from train.parallel.runtime import Runtime
from train.run_folder.writing import attempt

logger = logging.getLogger(__name__)

MEMORY_EVENTS = 200_000
"""Latest allocations and frees that a snapshot of memory keeps."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """The steps that are profiled, into RUN/profile."""

    start: int = 0
    """First step to profile, counted from 0, also in a run that is resumed. The first steps of a
    process load and compile what they need: start a few later."""
    steps: int = 0
    """Number of steps to profile; 0: none."""
    ranks: Literal["one", "all"] = "one"
    """one: rank 0 alone. all: every rank, a file each."""

    def problems(self, T: int) -> list[str]:
        """Return what is wrong with the fields in a run of T steps, one line each."""
        found = [
            f"profile.{name}: {value}, must not be negative"
            for name, value in (("start", self.start), ("steps", self.steps))
            if value < 0
        ]
        if self.start and not self.steps:
            found.append(
                f"profile.start: {self.start}, but profile.steps is 0, give the number of steps"
            )
        if self.steps and self.start >= T > 0:
            found.append(
                f"profile.start: {self.start}, but the run's last step is {T - 1}, counted from 0, "
                "start earlier"
            )
        return found


class Profiler:
    """Profiles the steps of a run that the configuration names; does nothing in all others."""

    def __init__(
        self, config: ProfileConfig, T: int, run_dir: Path, runtime: Runtime, sections: Sections
    ) -> None:
        """Profile nothing yet of a run of T steps."""
        profiles = runtime.is_main or config.ranks == "all"
        self._steps = range(config.start, min(T, config.start + config.steps * profiles))
        self._folder, self._runtime, self._sections = run_dir / "profile", runtime, sections
        self._on_gpu = runtime.device.type == "cuda"
        self._profile: profile | None = None
        self._step: record_function | None = None
        self._first = self._next = 0

    def enter(self, t: int) -> None:
        """End the step before t and begin step t, its wait for data included."""
        if t not in self._steps:
            self.close()
            return
        if self._profile is None:
            self._begin(t)
        self._end_step()
        # The name by which TensorBoard's plugin tells the steps.
        self._step, self._next = record_function(f"ProfilerStep#{t}"), t + 1
        self._step.__enter__()

    def close(self) -> None:
        """End the profile, if there is one, and write it."""
        if self._profile is None:
            return
        self._sections.enter("log", self._next - 1)
        self._end_step()
        ended, self._profile = self._profile, None
        ended.stop()
        self._write(ended)

    def _begin(self, t: int) -> None:
        self._sections.enter("log", t)
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._first, self._profile = t, profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = None

    def _write(self, ended: profile) -> None:
        """Write the trace, and on a GPU the snapshot of its memory."""
        name = f"steps-{self._first:08d}-{self._next - 1:08d}-rank-{self._runtime.rank}"
        trace = self._folder / f"{name}.pt.trace.json.gz"
        if _export(trace, lambda path: ended.export_chrome_trace(str(path))):
            logger.info("profile: steps %d to %d in %s", self._first, self._next - 1, trace)
        if self._on_gpu:
            memory = torch.cuda.memory
            _export(self._folder / f"{name}.memory.pickle", lambda p: memory._dump_snapshot(str(p)))
            memory._record_memory_history(enabled=None)


def _export(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file aside and rename it into place; return whether that succeeded."""
    aside = path.with_name(f"tmp-{path.name}")  # the suffix decides how it is written

    def whole() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    return attempt(path, whole)
