"""Greedy continuations and what every exit predicts along them: the oracle, SPEED's cost model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.generation import Generation
from inference.strategies.autoregressive import Autoregressive
from models.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What the exits of some greedy continuations allow."""

    tokens: int
    agreement: list[float]
    """By E - 1: share of tokens whose exit after E layers says what the last layer says."""
    least_depth: dict[int, int]
    """Tokens by the least E whose exit agrees."""
    settled_depth: dict[int, int]
    """Tokens by the least E from which on every exit agrees."""
    mean_least: float
    mean_settled: float
    sequences: list[int]
    """For each continuation, the least E whose exit agrees at every one of its tokens."""


def record_continuations(
    model: Llama, prompts: Sequence[list[int]], *, max_new_tokens: int, batch_size: int
) -> tuple[list[list[int]], list[Tensor]]:
    """Decode greedily with all layers, and return what every exit says along the way.

    Returns:
        Each prompt with its continuation, and its `record_exits` from the prompt's end.
    """
    whole = Generation(
        model, prompts, Autoregressive(), max_new_tokens=max_new_tokens, batch_size=batch_size
    ).finish()
    rows = [prompt + tokens for prompt, tokens in zip(whole.prompts, whole.tokens, strict=True)]
    traces = [
        record_exits(model, row, len(prompt))
        for row, prompt in zip(rows, whole.prompts, strict=True)
    ]
    return rows, traces


@torch.inference_mode()
def record_exits(model: Llama, row: list[int], first: int) -> Tensor:
    """Return what every exit says along a row: (L, tokens) int64.

    Args:
        model: In eval mode.
        row: A prompt and its greedy continuation.
        first: Length of the prompt.
    """
    L = model.config.n_layers
    h = model.embed(torch.tensor([row], device=model.norm.weight.device))
    _, exits = model.run_layers(h, 0, L, exit_layers=range(L))
    said = [model.exit_logits(exits[l][0, first - 1 : -1], l + 1).argmax(-1) for l in range(L)]
    return torch.stack(said).cpu()


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
        right, place = (trace[E - 1] == trace[-1]).tolist(), 0
        while place < len(right):
            burst = right[place : place + lanes]
            good = burst.index(False) if False in burst else len(burst)
            kept, flushed, bursts = kept + good, flushed + (good < len(burst)), bursts + 1
            place += good + 1  # the last layer's own token follows in any case
    return kept / bursts, flushed / bursts
