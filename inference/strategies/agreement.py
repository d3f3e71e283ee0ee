"""How often drafts agree with the last layer, learnt while decoding, and the E and d that pay best.

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
    """Of tokens that one exit, or guesses, gave."""

    memory: float
    """What weight an observation keeps when the next comes."""
    agreed: float = 1.0
    """Tokens seen to agree, old ones counting less; at first as if one of two had."""
    seen: float = 2.0
    """Tokens looked at, old ones counting less."""

    def add(self, agreed: float, seen: float) -> None:
        """Take in an observation."""
        self.agreed = self.memory * self.agreed + agreed
        self.seen = self.memory * self.seen + seen

    def at_least(self) -> float:
        """Return a = agreed / seen less its standard error.

        Of many exits seen a few times, the best is mostly the one that had luck.
        """
        a = min(1.0, self.agreed / self.seen)  # sums of probabilities may be a hair above
        return max(0.0, a - math.sqrt(a * (1.0 - a) / self.seen))


def drafts_that_agreed(result: Round, rows: Tensor) -> Tensor:
    """Return how many drafted tokens agreed, and how many were tried, after others that agreed.

    Args:
        result: The round.
        rows: (batch,) bool, rows that count.

    Returns:
        (2,) int64.
    """
    tried = result.accepted + (result.accepted < result.drafted)
    return (torch.stack((result.accepted, tried)) * rows).sum(1)


def lookups_that_agreed(guesses: NgramDrafts, result: Round, live: Tensor) -> Tensor:
    """Return the same of guesses, as far as it is known.

    Any round tells, whoever drafted its tokens: a guess is held against the tokens that were found.

    Args:
        guesses: Made before the round.
        result: The round.
        live: (batch,) bool, rows that count.

    Returns:
        (2,) int64.
    """
    n = min(guesses.tokens.shape[1], result.tokens.shape[1])
    known = torch.arange(n, device=live.device) <= result.accepted[:, None]
    right = known & (guesses.tokens[:, :n] == result.tokens[:, :n])
    agreed = right.long().cumprod(1).sum(1)
    tried = (agreed + 1).minimum(known.sum(1))
    return (torch.stack((agreed, tried)) * (live & guesses.found)).sum(1)


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
