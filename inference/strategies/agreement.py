"""How often what is drafted agrees with the last layer, learnt while decoding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.state import Round
from inference.strategies.drafting import NgramDrafts


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
