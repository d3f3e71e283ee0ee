"""The rounds of greedy self-speculation, counted from what every exit predicts along a text.

Greedy, a draft of the first E layers is accepted as long as it is what all layers choose, and the
keys and values of these layers are those of a full pass. So the rounds of every (E, d) follow from
one greedy continuation; `inference/strategies/self_speculative.py` really drafts and verifies, and
comes to the same counts. E = number of layers run, d = tokens drafted in a round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.config import LlamaConfig
from models.flops import step_params

Choices = NDArray[np.int64]


@dataclass(frozen=True)
class Rounds:
    """What the rounds of some rows come to; drafts are counted up to a row's end."""

    tokens: int = 0
    """New tokens, the one that ends a row included."""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Rounds") -> "Rounds":
        return Rounds(
            self.tokens + other.tokens,
            self.rounds + other.rounds,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


def up_to_end(choices: Choices, end: int) -> Choices:
    """Return choices, (L, tokens) int64, up to the last layer's first `end`, which is kept."""
    ends = np.flatnonzero(choices[-1] == end)
    return choices[:, : ends[0] + 1] if len(ends) else choices


def count_rounds(drafts: Sequence[int], text: Sequence[int], d: int, end: int) -> Rounds:
    """Count the rounds of one row, decoded alone.

    Args:
        drafts: What the exit predicts at each position of the continuation.
        text: What all layers predict there, which is the continuation, to its longest length.
        d: Most tokens drafted in a round; fewer where fewer may still be added.
        end: The token that ends the row before.
    """
    found, at, n = Rounds(), 0, len(text)
    stop = text.index(end) + 1 if end in text else n
    while at < stop:
        tried = min(d, n - at - 1)
        pairs = zip(drafts[at : at + tried], text[at : at + tried], strict=True)
        accepted = next((i for i, (draft, token) in enumerate(pairs) if draft != token), tried)
        new = min(accepted + 1, stop - at)
        if new <= accepted:  # the row ends among the accepted drafts
            tried = accepted = new
        found += Rounds(new, 1, tried, accepted)
        at += new
    return found


def draft_cost(config: LlamaConfig, E: int) -> float:
    """Return c, the weights that a draft step of E layers reads over those of a full step.

    Both read the head. A step of one row takes about the time that its weights take to be read.
    """
    return step_params(config, E) / step_params(config, config.n_layers)


def speedup_bound(rounds: Rounds, d: int, c: float) -> float:
    """Return the most that such rounds gain over plain decoding: tokens per round / (1 + d c).

    A verification of d + 1 tokens counts as one full step, and nothing else takes time.
    """
    return rounds.tokens / max(rounds.rounds, 1) / (1 + d * c)
