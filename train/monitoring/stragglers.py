"""Name the straggler: the rank that all the others wait for.

In synchronous training every rank's step takes as long as the slowest rank's, so a straggler does
not show in the duration of a step, but in the waiting: the others sit in a collective while it
works. A thread samples the main thread's stack fifty times a second: whether it is inside
torch.distributed, and at which line otherwise. That needs no collective and no wait for the device.

It covers all of the host: data, forward, backward, optimizer, logging. On a CPU with gloo the host
is all there is. On GPUs with NCCL the host only launches kernels; a slow GPU shows in a small fixed
computation that each rank times on its own. Untested on NCCL.
"""

import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from train.monitoring.main_thread import innermost_line, waits
from train.parallel.runtime import Runtime

SAMPLE_SECONDS = 0.02
# Not "log", which is rank 0's alone, and not "setup", of which there is one.
COMPARED = ("data", "step", "validate", "checkpoint")
PROBE = "probe"


@dataclass(frozen=True, kw_only=True)
class StragglerConfig:
    """When a rank counts as slower than the others."""

    interval_steps: int = 10
    """Steps between comparisons of the ranks; 0 turns them off."""
    ratio: float = 1.5
    """A straggler takes more than this many times the median time of the other ranks."""
    min_share: float = 0.1
    """Also, it exceeds that median by more than this share of the time of a step."""
    min_seconds: float = 0.25
    """Also, by more than this since the last comparison: the noise of the measurement."""
    probe: bool = True
    """On GPUs, also time a small fixed computation on each (a few ms per comparison)."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        checks = [
            ("interval_steps", self.interval_steps >= 0, "must not be negative"),
            ("ratio", self.ratio > 1, "must exceed 1"),
            ("min_share", 0 <= self.min_share < 1, "must lie in [0, 1)"),
            ("min_seconds", self.min_seconds >= 0, "must not be negative"),
        ]
        return [
            f"stragglers.{name}: {getattr(self, name)}, {remedy}"
            for name, ok, remedy in checks
            if not ok
        ]


class WorkTime(NamedTuple):
    """How one rank has spent its time since the last reading."""

    seconds: Mapping[str, float]
    """Time at work by section, without waiting for other ranks. "probe": the probe's."""
    lines: Mapping[str, str]
    """The line of our code that each section spent most of it at."""
    total_seconds: float
    """Work and waiting together."""


def find_stragglers(
    by_rank: Sequence[WorkTime], config: StragglerConfig, *, steps: int
) -> list[str]:
    """Return a line for each rank and section slower than the median of the other ranks.

    Args:
        by_rank: Every rank's time at work over the same steps.
        config: What counts as slower.
        steps: Number of these steps.
    """
    lines = []
    step_seconds = statistics.median(rank.total_seconds for rank in by_rank) / steps
    for section in (*COMPARED, PROBE):
        seconds = [rank.seconds.get(section, 0.0) for rank in by_rank]
        for rank, mine in enumerate(seconds):
            others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
            if mine <= config.ratio * others:
                continue
            score = f"{mine / others:.1f} times" if others > 0 else "unlike"
            if section == PROBE:
                lines.append(
                    f"stragglers: the device of rank {rank} is slow: {mine * 1e3:.1f} ms for a "
                    f"fixed computation, {score} the other ranks' median {others * 1e3:.1f} ms, "
                    "check its clocks and temperature"
                )
            elif mine - others > max(config.min_seconds, config.min_share * step_seconds * steps):
                lines.append(
                    f"stragglers: rank {rank} is slow in {section}: {mine / steps:.3f} s/step of "
                    f"its own, {score} the other ranks' median {others / steps:.3f} s/step, "
                    f"mostly at {by_rank[rank].lines.get(section, 'no line of ours')}"
                )
    return lines


class StragglerWatch:
    """Samples this rank's main thread in the background; compares the ranks where that is due."""

    def __init__(
        self,
        config: StragglerConfig,
        runtime: Runtime,
        section: Callable[[], str],
        *,
        done_steps: int,
    ) -> None:
        """Start to sample; `close` ends it.

        Args:
            config: What counts as slow.
            runtime: This rank.
            section: Returns, in any thread, the main thread's section.
            done_steps: Where training starts.
        """
        self._config, self._runtime, self._section = config, runtime, section
        self._read_at, self._warm = done_steps, False
        self._on = bool(config.interval_steps) and runtime.world_size > 1
        self._lock = threading.Lock()
        self._clear()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="stragglers", daemon=True)
        if self._on:
            self._thread.start()

    def due(self, done_steps: int) -> bool:
        """Whether the ranks are compared after the step that makes it `done_steps`."""
        return self._on and done_steps % self._config.interval_steps == 0

    def read(self, done_steps: int) -> list[str]:
        """Compare the ranks since the last reading; every rank calls this after the same step.

        Returns:
            A line for each straggler, the same on every rank; none at the first reading: in the
            first steps ranks load and compile what they need.
        """
        by_rank = self._runtime.gather(self._work_time())
        steps, self._read_at = done_steps - self._read_at, done_steps
        compares, self._warm = self._warm and steps > 0, True  # a rollback takes steps back
        return find_stragglers(by_rank, self._config, steps=steps) if compares else []

    def close(self) -> None:
        """Stop sampling."""
        self._closed.set()
        if self._on:
            self._thread.join()

    def _work_time(self) -> WorkTime:
        with self._lock:
            seconds, samples, total = dict(self._seconds), self._samples, self._total
            self._clear()
        if self._config.probe and self._runtime.device.type == "cuda":
            seconds[PROBE] = probe_seconds(self._runtime.device)
        lines = {section: counts.most_common(1)[0][0] for section, counts in samples.items()}
        return WorkTime(seconds, lines, total)

    def _clear(self) -> None:
        self._seconds: dict[str, float] = {}
        self._samples: dict[str, Counter[str]] = {}
        self._total = 0.0

    def _sample(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        last = time.monotonic()
        while not self._closed.wait(SAMPLE_SECONDS):
            frame, section = sys._current_frames().get(main), self._section()
            now = time.monotonic()
            elapsed, last = now - last, now
            if frame is None:
                return
            line = None if waits(frame) else innermost_line(frame)
            with self._lock:
                self._total += elapsed
                if line is not None:
                    self._seconds[section] = self._seconds.get(section, 0.0) + elapsed
                    self._samples.setdefault(section, Counter())[line] += 1


@torch.no_grad()
def probe_seconds(device: torch.device) -> float:
    """Time a fixed chain of matrix products on this rank; return the best of three, in seconds.

    Waits for the device, and for no other rank.
    """
    size, products = (2048, 32) if device.type == "cuda" else (256, 4)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        b = torch.eye(size, dtype=dtype, device=device)
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(products):
            b = a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
