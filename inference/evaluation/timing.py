"""Seconds of short calls, measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from inference.engine.generation import wait_for

TIMINGS = 12
"""Times each call is timed, unless a quick measurement takes fewer."""
_CALLS_PER_TIMING = 4

K = TypeVar("K")


def median_seconds(
    calls: Mapping[K, Callable[[], object]], device: torch.device, timings: int
) -> dict[K, float]:
    """Return the median seconds of each call.

    The calls take turns, a few of a kind together: in decoding, too, a step follows one of its
    kind and finds its weights in the processor's cache.
    """
    seconds: dict[K, list[float]] = {key: [] for key in calls}
    for _ in range(timings):
        for key, call in calls.items():
            start = time.perf_counter()
            for _ in range(_CALLS_PER_TIMING):
                call()
            wait_for(device)
            seconds[key].append((time.perf_counter() - start) / _CALLS_PER_TIMING)
    return {key: statistics.median(times) for key, times in seconds.items()}
