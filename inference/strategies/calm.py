"""CALM (arXiv 2207.07061): a token exits at the first exit whose confidence reaches a threshold."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.confidence import softmax_gap
from inference.strategies.gate import TRAINED_BY, decode_gated
from inference.strategies.jump_maps import load_exit_map
from inference.strategies.row_exits import (
    ExitObservation,
    decode_until_sure,
    exit_problems,
    exits_from,
)


@dataclass(frozen=True, kw_only=True)
class Calm(Strategy):
    """Exit at the first exit whose confidence reaches a threshold.

    CALM (arXiv 2207.07061), equation 5 for the threshold of the t-th new token:
      lambda'(t) = clip(0.9 lambda + 0.1 exp(-tau t / N), 0, 1)
    """

    name: ClassVar[str] = "calm"
    confidence: Literal["gap", "similarity", "gate"] = "gap"
    """gap: difference of the exit's two largest probabilities. similarity: cosine of its hidden
    state and that of one interval earlier, in the paper one layer. gate: score of a fitted
    classifier, as in the strategy gate. The last two need no head at an exit."""
    threshold: float = 0.9
    """lambda; above 1 no token exits early."""
    tau: float | None = None
    """How fast the threshold falls from its first value (the authors use 4); constant if not
    given."""
    length: int = 128
    """N, new tokens over which it falls."""
    first: int = 1
    """Layers before the first exit."""
    interval: int = 1
    """Layers from one exit to the next."""
    gate: Path | None = None
    """The classifier: a file that inference.train_gate wrote."""
    jump: Path | None = None
    """A linear map before the head of every exit: a file that inference.fit_jump wrote."""

    def problems(self, n_layers: int) -> list[str]:
        found = exit_problems(self.first, self.interval, n_layers) + self.below(0, threshold="")
        if self.tau is not None:
            found += self.below(0, tau="")
            if self.tau == math.inf:
                found.append("tau: inf, give a finite number, or leave it out")
        if too_short := self.below(1, length="token"):
            found += too_short
        elif not self.tau:
            found += self.unused_settings("length", without="tau above 0")
        if (self.confidence == "gate") != (self.gate is not None):
            remedy = TRAINED_BY if self.gate is None else "it needs confidence=gate"
            found.append(f"gate: {self.gate or 'none'}, {remedy}")
        return found

    def start(self, state: DecodeState) -> Decoder:
        exits = exits_from(self.first, self.interval, state.model.config.n_layers)
        if self.gate is not None:
            return decode_gated(state, self.gate, self.threshold_at, exits=exits, jump=self.jump)
        exit_map = load_exit_map(self.jump, state.model)
        return decode_until_sure(state, exits, lambda: self.exiting, exit_map)

    def exiting(self, exit_: ExitObservation) -> Tensor:
        """Return the rows that exit, (batch,) bool, by a confidence that needs no file."""
        if self.confidence == "gap":
            confidence = softmax_gap(exit_.logits())
        else:
            confidence = torch.cosine_similarity(exit_.h.float(), exit_.before.float(), dim=-1)
        return confidence >= self.threshold_at(exit_.new_tokens)

    def threshold_at(self, t: Tensor) -> Tensor:
        """Return lambda'(t), for t: (batch,) int64."""
        if self.tau is None:
            return torch.full(t.shape, self.threshold, device=t.device)
        fall = 0.1 * torch.exp(-self.tau * t / self.length)
        return (0.9 * self.threshold + fall).clamp(0.0, 1.0)
