"""Which E and d promise most tokens for what their rounds cost: DEL (arXiv 2504.05598)."""

import math
from collections.abc import Mapping

from models.config import LlamaConfig
from models.flops import block_params, own_exit_params


def by_parameters(config: LlamaConfig, E: int) -> float:
    """Return what a token costs at the exit after E layers, in full steps, by what it multiplies.

    That is the layers, what the exit has of its own, and the LM head.
    """
    block, head = block_params(config), config.dim * config.vocab_size
    own = own_exit_params(config) / len(config.own_exits) if E in config.own_exits else 0
    return (E * block + own + head) / (config.n_layers * block + head)


def cost_problems(
    name: str, costs: tuple[float, ...] | None, lengths: tuple[int, ...]
) -> list[str]:
    """Return what is wrong with costs of which there may be so many."""
    if costs is None:
        return []
    written = "+".join(map(str, costs))
    if not all(0.0 < cost < math.inf for cost in costs):
        return [f"{name}: {written}, give full steps, more than 0"]
    if len(costs) not in lengths:
        return [f"{name}: {written}, give {' or '.join(map(str, sorted({*lengths})))} of them"]
    return []


def best_pair(
    agreement: Mapping[int, float],
    draft_costs: Mapping[int, float],
    verify_costs: Mapping[int, float],
    most: int,
) -> tuple[int, int, float]:
    """Return E, d and their tokens per full step, the most of all.

    Args:
        agreement: a_E by E, at least one.
        draft_costs: c_E, one draft step over one full step, for the same E.
        verify_costs: v_E, the rest of a round of such drafts over one full step.
        most: Largest d.

    Returns:
        E, d and the tokens; d = 0, plain decoding of 1 token per step, where no pair gives more.
    """
    best, E_best, d_best = 1.0, min(agreement), 0
    for E, a in agreement.items():
        tokens = 1.0
        for d in range(1, most + 1):
            tokens += a**d
            gain = tokens / (d * draft_costs[E] + verify_costs[E])
            if gain > best:
                best, E_best, d_best = gain, E, d
    return E_best, d_best, best
