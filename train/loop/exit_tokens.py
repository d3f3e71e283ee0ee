"""Which tokens the exits before the last learn from, where they learn from a share of them."""

import numpy as np
from numpy.typing import NDArray

from models.layer_dropout import uniform

DRAW = 0x65786974
"""Tells these draws from those of layer dropout, which hang on the same seed, step and sample."""


def draw_tokens(
    fraction: float, *, seed: int, t: int, samples: NDArray[np.int64], seq: int
) -> NDArray[np.int64]:
    """Choose equally many tokens of every sequence: those of the smallest draws.

    A draw is a pure function of (seed, t, sample, position), and a sequence's choice hangs on its
    own draws alone, so the split over ranks and microbatches does not matter. Every position is as
    likely as another.

    Args:
        fraction: Share of each sequence, rounded to whole tokens, at least one.
        seed: Any non-negative integer.
        t: Optimizer step.
        samples: (batch,) each sequence's place in the global batch.
        seq: Tokens of a sequence.

    Returns:
        (batch * tokens of each,) indices into (batch * seq), ascending.
    """
    count = max(1, round(fraction * seq))
    draws = uniform(seed ^ DRAW, t, seq, samples)  # a position where layer dropout has a layer
    chosen = np.sort(np.argpartition(draws, count - 1, axis=0)[:count], axis=0)
    return (np.arange(len(samples))[:, None] * seq + chosen.T).ravel()
