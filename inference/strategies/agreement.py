"""Agreement of drafts with the last layer, estimated while decoding, and the shape that pays most.

DEL (arXiv 2504.05598).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.strategies.drafting import NgramDrafts
from models.config import LlamaConfig
from models.flops import block_params, own_exit_params


@dataclass
class Agreement:
    """A running estimate of a, the probability that a drafted token agrees with the last layer.

    For the drafts of one exit, or their leaves of one rank where no candidate before them agreed,
    or n-gram lookups.
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
    own = _own(result)
    return (torch.stack((own, own + (own < result.drafted))) * rows).sum(1)


def _own(result: Round) -> Tensor:
    """Return (batch,) int64, the drafted tokens accepted, leaves left out."""
    return result.accepted if result.leaf is None else result.accepted - (result.leaf > 0).long()


def count_agreed_leaves(result: Round, rows: Tensor, branch: int) -> Tensor:
    """Count, for each rank, the leaves that agreed, and those where none before them had.

    Args:
        result: The round, with leaves.
        rows: (batch,) bool, rows that count.
        branch: Candidates for each token.

    Returns:
        (branch - 1, 2) int64, agreed and tried.
    """
    assert result.leaf is not None
    ranks = torch.arange(1, branch, device=rows.device)[:, None]
    rejected = rows & (_own(result) < result.drafted)
    tried = rejected & ((result.leaf == 0) | (result.leaf >= ranks))
    return torch.stack((tried & (result.leaf == ranks), tried), dim=1).sum(2)


def count_agreed_exits(chances: Tensor, counts: Tensor) -> Tensor:
    """Add up what each exit's candidates would have come to.

    Args:
        chances: (exits, batch, n, candidates), see `acceptance_chances`.
        counts: (batch, n) bool, tokens that count.

    Returns:
        (exits, candidates, 2), agreed and tried.
    """
    reached = torch.cat((torch.ones_like(chances[..., :1]), 1 - chances[..., :-1]), -1).cumprod(-1)
    tried = reached.clamp_min(0.0) * counts[..., None]
    return torch.stack((tried * chances, tried), dim=-1).sum((1, 2))


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


class Shape(NamedTuple):
    """A round of drafts."""

    E: int
    d: int
    """0: plain decoding."""
    branch: int
    gain: float
    """Tokens per full step."""


def best_shape(
    agreement: Mapping[int, Sequence[float]],
    draft_costs: Mapping[int, float],
    verify_costs: Mapping[int, float],
    leaf_costs: tuple[float, float],
    max_d: int,
) -> Shape:
    """Return the E, d and branch of most tokens per full step.

    That is (1 + a + ... + a^d + (1 - a^d) m) / (d c + v + w), where m is the chance that a leaf
    agrees where the drafted token does not, and w the cost of d (branch - 1) leaves.

    Args:
        agreement: By E, at least one, a_E, and for each leaf by rank the chance that it agrees
            where no candidate before it does.
        draft_costs: c_E, one draft step over one full step, for the same E.
        verify_costs: v_E, the rest of a round of such drafts over one full step.
        leaf_costs: Of having leaves in a round, and of each.
        max_d: Largest d.

    Returns:
        The shape; d = 0, plain decoding of 1 token per step, where no other has more.
    """
    best = Shape(min(agreement), 0, 1, 1.0)
    for E, (a, *leaves) in agreement.items():
        tokens = 1.0
        for d in range(1, max_d + 1):
            tokens += a**d
            cost, none_agrees = d * draft_costs[E] + verify_costs[E], 1.0
            if tokens / cost > best.gain:
                best = Shape(E, d, 1, tokens / cost)
            for rank, b in enumerate(leaves, start=1):
                none_agrees *= 1.0 - b
                gain = tokens + (1.0 - a**d) * (1.0 - none_agrees)
                gain /= cost + leaf_costs[0] + leaf_costs[1] * d * rank
                if gain > best.gain:
                    best = Shape(E, d, rank + 1, gain)
    return best
