"""Static early exit: one token a round, from the first E layers.

LayerSkip (arXiv 2404.16710), section 4.2. E = number of layers run: tokens exit after layer
l = E - 1, later layers never run, and their part of the KV cache is never read.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import one_by_one
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class EarlyExit(Strategy):
    """Decode with the first E layers."""

    name: ClassVar[str] = "early_exit"
    E: int | None = None
    """Layers to run, 1 to n_layers; a quarter of the model's if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        return replace(self, E=self.E if self.E is not None else default_exit(n_layers))

    def problems(self, n_layers: int) -> list[str]:
        if self.E is not None and 1 <= self.E <= n_layers:
            return []
        return [f"E: {self.E}, early_exit needs 1 to {n_layers} for this model"]

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        assert self.E is not None
        return self.E, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        assert self.E is not None
        return one_by_one(state, self.E, NOTHING)


def default_exit(n_layers: int) -> int:
    """Return E where none is given: a quarter of the layers, rounded, at least 1."""
    return max(1, round(n_layers / 4))
