"""The least depth that any exit rule can reach, and SPEED's cost model, from recorded exits."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What the exits of some greedy continuations allow."""

    tokens: int
    agreement: list[float]
    """By E - 1: share of tokens whose exit after E layers predicts the last layer's token."""
    least_depth: dict[int, int]
    """Tokens by the least E whose exit agrees."""
    settled_depth: dict[int, int]
    """Tokens by the least E from which on every exit agrees."""
    mean_least: float
    mean_settled: float
    sequences: list[int]
    """For each continuation, the least E whose exit agrees at every one of its tokens."""


def find_oracle(traces: list[Tensor]) -> Oracle:
    """Work out the oracle of traces (L, tokens), one for each continuation."""
    same = torch.cat([trace == trace[-1] for trace in traces], dim=1)  # (L, tokens)
    least = same.int().argmax(0) + 1
    # From the last layer down, the layers that agree without a gap.
    settled = len(same) + 1 - same.flip(0).int().cumprod(0).sum(0)
    sequences = [int((trace == trace[-1]).all(1).int().argmax()) + 1 for trace in traces]
    return Oracle(
        tokens=same.shape[1],
        agreement=same.float().mean(1).tolist(),
        least_depth=dict(sorted(Counter(least.tolist()).items())),
        settled_depth=dict(sorted(Counter(settled.tolist()).items())),
        mean_least=least.float().mean().item(),
        mean_settled=settled.float().mean().item(),
        sequences=sequences,
    )


def speed_model(traces: list[Tensor], E: int, lanes: int) -> tuple[float, float]:
    """Return (mean tokens kept of a burst, share of bursts flushed) of SPEED's pipeline.

    SPEED (arXiv 2310.12072) starts token after token from an early layer's prediction while those
    before are still in the later layers, and flushes what follows a wrong one. This is a model of
    its costs, not its decoding: worked out of recorded predictions, for bursts of `lanes` tokens
    in flight. Where layers do not share weights it is self-speculation with d = lanes.
    """
    kept, flushed, bursts = 0, 0, 0
    for trace in traces:
        right, position = (trace[E - 1] == trace[-1]).tolist(), 0
        while position < len(right):
            burst = right[position : position + lanes]
            good = burst.index(False) if False in burst else len(burst)
            kept, flushed, bursts = kept + good, flushed + (good < len(burst)), bursts + 1
            position += good + 1  # the last layer's own token follows in any case
    return kept / bursts, flushed / bursts
