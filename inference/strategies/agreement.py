"""Agreement of drafts with the last layer, estimated while decoding, and the E and d that pay most.

DEL (arXiv 2504.05598).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.strategies.drafting import NgramDrafts
from models.config import LlamaConfig
from models.flops import block_params, own_exit_params


@dataclass
class Agreement:
    """A running estimate of a, the probability that a drafted token agrees with the last layer.

    For the drafts of one exit, or of n-gram lookup.
    """

    memory: float
    """Weight an observation keeps when the next comes."""
    agreed: float = 1.0
    """Tokens that agreed, old ones weighing less; initially one of two."""
    tried: float = 2.0
    """Tokens compared, old ones weighing less."""

    def add(self, agreed: float, tried: float) -> None:
        """Add an observation."""
        self.agreed = self.memory * self.agreed + agreed
        self.tried = self.memory * self.tried + tried

    def lower_bound(self) -> float:
        """Return a = agreed / tried less its standard error.

        Of many exits with few observations, the best by a itself is mostly one that was lucky.
        """
        a = min(1.0, self.agreed / self.tried)  # sums of probabilities may be a hair above
        return max(0.0, a - math.sqrt(a * (1.0 - a) / self.tried))


def count_agreed_drafts(result: Round, rows: Tensor) -> Tensor:
    """Count the drafted tokens that agreed, and those compared, which follow only agreed ones.

    Args:
        result: The round.
        rows: (batch,) bool, rows that count.

    Returns:
        (2,) int64, agreed and tried.
    """
    tried = result.accepted + (result.accepted < result.drafted)
    return (torch.stack((result.accepted, tried)) * rows).sum(1)


def count_agreed_lookups(lookups: NgramDrafts, result: Round, rows: Tensor) -> Tensor:
    """Count the tokens of n-gram lookups that agreed, and those compared, as far as is known.

    They are compared with the tokens of the round, whether or not the lookups were its drafts.

    Args:
        lookups: Made before the round.
        result: The round.
        rows: (batch,) bool, rows that count.

    Returns:
        (2,) int64, agreed and tried.
    """
    n = min(lookups.tokens.shape[1], result.tokens.shape[1])
    known = torch.arange(n, device=rows.device) <= result.accepted[:, None]
    right = known & (lookups.tokens[:, :n] == result.tokens[:, :n])
    agreed = right.long().cumprod(1).sum(1)
    tried = (agreed + 1).minimum(known.sum(1))
    return (torch.stack((agreed, tried)) * (rows & lookups.found)).sum(1)


def parameter_cost(config: LlamaConfig, E: int) -> float:
    """Return the cost of a token drafted with E layers, in full steps, by parameters multiplied.

    Those are the parameters of the layers, of the exit itself, and of the LM head.
    """
    block, head = block_params(config), config.dim * config.vocab_size
    own = own_exit_params(config) / len(config.own_exits) if E in config.own_exits else 0
    return (E * block + own + head) / (config.n_layers * block + head)


def cost_problems(
    name: str, costs: tuple[float, ...] | None, lengths: tuple[int, ...]
) -> list[str]:
    """Return what is wrong with the costs of the setting `name`, of which `lengths` are allowed."""
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
    max_d: int,
) -> tuple[int, int, float]:
    """Return the E and d of most tokens per full step, and that number.

    Args:
        agreement: a_E by E, at least one.
        draft_costs: c_E, one draft step over one full step, for the same E.
        verify_costs: v_E, the rest of a round of such drafts over one full step.
        max_d: Largest d.

    Returns:
        E, d and tokens per step; d = 0, plain decoding of 1 token per step, where no pair has more.
    """
    best, E_best, d_best = 1.0, min(agreement), 0
    for E, a in agreement.items():
        tokens = 1.0
        for d in range(1, max_d + 1):
            tokens += a**d
            gain = tokens / (d * draft_costs[E] + verify_costs[E])
            if gain > best:
                best, E_best, d_best = gain, E, d
    return E_best, d_best, best
