"""The memory that --dry_run expects of a configuration, found in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def planned_gib(config: Any) -> float:
    """Return the peak memory of a GPU, in GiB, of a run on one."""
    return _pool().submit(_plan, config).result()


def _plan(config: Any) -> float:
    from train.planning.dry_run import worst_work
    from train.planning.memory import measure

    steps = [config.layerskip.at(t) for t in range(config.steps)]
    return measure(worst_work(config, steps, 1), on_gpu=True).device.total / 2**30
