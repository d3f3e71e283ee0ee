"""LayerDrop's pruning (arXiv 1909.11556): some layers never run, as in a model without them."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import one_by_one
from inference.strategies.kept_layers import keep_problems, other_layers
from models.llama import SkippedParts


@dataclass(frozen=True, kw_only=True)
class Pruned(Strategy):
    """Run prompt and new tokens through some layers alone, as a model without the others would.

    LayerDrop (arXiv 1909.11556), *Every Other*: for a pruning rate 1 / N every N-th layer is
    dropped. The paper drops depths d = 0 mod N counted from 0; ours drops l = N - 1 mod N, so that
    layer 0, whose loss costs a Llama most, stays.
    """

    name: ClassVar[str] = "pruned"
    every: int = 2
    """N: one layer of every N is left out; at most n_layers."""
    keep: tuple[int, ...] | None = None
    """Layers l to run; derived from `every` if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        if self.keep is not None or self.every < 2:
            return self
        keep = tuple(l for l in range(n_layers) if l % self.every != self.every - 1)
        return replace(self, keep=keep)

    def problems(self, n_layers: int) -> list[str]:
        if self.keep is None:
            return [f"every: {self.every}, pruned needs at least 2"]
        default = replace(self, keep=None).with_defaults(n_layers).keep
        if self.keep == default and self.every > n_layers > 1:
            reach = f"leaves out none of {n_layers} layers, give 2 to {n_layers}"
            return [f"every: {self.every}, {reach}"]
        return keep_problems(self, self.keep, n_layers, default=default, setting="every")

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        return n_layers, other_layers(self.keep, n_layers)

    def start(self, state: DecodeState) -> Decoder:
        n_layers = state.model.config.n_layers
        return one_by_one(state, n_layers, other_layers(self.keep, n_layers))
