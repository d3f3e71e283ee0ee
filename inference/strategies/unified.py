"""Unified Layer Skipping (arXiv 2404.06954): new tokens run the same evenly spaced layers."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import one_by_one
from inference.strategies.kept_layers import keep_problems, other_layers
from models.token_depth import unified_layers


@dataclass(frozen=True, kw_only=True)
class Unified(Strategy):
    """Run the prompt through all layers and every new token through the same evenly spaced ones.

    Unified Layer Skipping (arXiv 2404.06954), see `models.token_depth.unified_layers`.
    """

    name: ClassVar[str] = "unified"
    speedup: float = 2.0
    """Layers of the model over layers run for a new token."""
    keep: tuple[int, ...] | None = None
    """Layers l to run; derived from the speedup if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        if self.keep is not None or not self.speedup >= 1.0:
            return self
        return replace(self, keep=unified_layers(n_layers, self.speedup))

    def problems(self, n_layers: int) -> list[str]:
        if self.keep is None:
            return [f"speedup: {self.speedup}, unified needs at least 1"]
        default = replace(self, keep=None).with_defaults(n_layers).keep
        return keep_problems(self, self.keep, n_layers, default=default, setting="speedup")

    def start(self, state: DecodeState) -> Decoder:
        n_layers = state.model.config.n_layers
        return one_by_one(state, n_layers, other_layers(self.keep, n_layers))
