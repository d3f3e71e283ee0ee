"""One token per round, from all layers or from the first E: plain decoding and early exit.

E = number of layers run. Early exit (LayerSkip, arXiv 2404.16710, section 4.2) leaves at layer
l = E - 1 for good: later layers never run, and their part of the KV cache is never read.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch

from inference.engine.sampling import sample
from inference.engine.state import Decoder, DecodeState, GraphableDecoder, Round
from inference.engine.strategy import Strategy
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Strategy):
    """Decode with all layers."""

    name: ClassVar[str] = "autoregressive"

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        return one_by_one(state, state.model.config.n_layers, NOTHING)


@dataclass(frozen=True, kw_only=True)
class EarlyExit(Strategy):
    """Decode with the first E layers."""

    name: ClassVar[str] = "early_exit"
    E: int | None = None
    """Layers to run, 1 to n_layers; a quarter of the model's if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with E set."""
        return replace(self, E=self.E if self.E is not None else a_quarter(n_layers))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with E."""
        if self.E is not None and 1 <= self.E <= n_layers:
            return []
        return [f"E: {self.E}, early_exit needs 1 to {n_layers} for this model"]

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the first E layers."""
        assert self.E is not None
        return self.E, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        assert self.E is not None
        return one_by_one(state, self.E, NOTHING)


def one_by_one(state: DecodeState, depth: int, skipped: SkippedParts) -> Decoder:
    """Return a decoder of one token a round from the first layers, less those skipped."""
    return GraphableDecoder(1, partial(decode_one, state, depth, skipped))


def decode_one(state: DecodeState, depth: int, skipped: SkippedParts, max_tokens: int) -> Round:
    """Draw one token after each pending one from the first layers, less those skipped."""
    h = state.run(state.model.embed(state.pending[:, None]), 0, depth, skipped=skipped)
    tokens = sample(state.distribution(h, depth), state.generator)
    none = torch.zeros_like(state.positions)
    return Round(tokens, accepted=none, drafted=none)


def a_quarter(n_layers: int) -> int:
    """Return a quarter of the layers, rounded, at least 1."""
    return max(1, round(n_layers / 4))
