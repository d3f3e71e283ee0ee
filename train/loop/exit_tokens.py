"""Draw the tokens that the exits before the last learn from, where those are a share of all."""

import numpy as np
from numpy.typing import NDArray

from models.layer_dropout import uniform

DRAW = 0x65786974
"""Separates these draws from those of layer dropout, of the same seed, step and sample."""


def draw_tokens(
    fraction: float, *, seed: int, t: int, samples: NDArray[np.int64], seq: int
) -> NDArray[np.int64]:
    """Choose equally many tokens of every sequence: those of the smallest draws.

    A draw is a pure function of (seed, t, sample, position), and the choice in a sequence depends
    on its own draws alone, so it is the same however the batch is split over ranks and
    microbatches. All positions are equally likely.

    Args:
        fraction: Share of each sequence, rounded to whole tokens, at least one.
        seed: Any non-negative integer.
        t: Optimizer step.
        samples: (batch,) int64 index of each sequence in the global batch.
        seq: Tokens per sequence.

    Returns:
        (batch * tokens per sequence,) int64 indices into (batch * seq), ascending.
    """
    count = max(1, round(fraction * seq))
    draws = uniform(seed ^ DRAW, t, seq, samples)  # a position in place of the layer
    chosen = np.sort(np.argpartition(draws, count - 1, axis=0)[:count], axis=0)
    return (np.arange(len(samples))[:, None] * seq + chosen.T).ravel()
