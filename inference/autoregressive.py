"""One token per round, from all layers or from the first E: plain decoding and early exit.

E = number of layers run. Early exit (LayerSkip, arXiv 2404.16710, section 4.2) leaves at layer
l = E - 1 for good: later layers never run, and their part of the KV cache is never read.
"""

from dataclasses import dataclass

import torch

from inference.sampling import sample
from inference.state import DecodeState, Round


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Decode with the first E layers; None means all of them."""

    E: int | None = None
    """Layers to run, 1 to n_layers."""

    def depth(self, n_layers: int) -> int:
        """Return E."""
        return n_layers if self.E is None else self.E

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with E for a model of n_layers layers."""
        if not 1 <= self.depth(n_layers) <= n_layers:
            return [f"E: {self.E}, early_exit needs 1 to {n_layers} for this model"]
        return []

    def round(self, state: DecodeState, room: int) -> Round:
        """Draw one token after each pending one; `room` is at least 1."""
        h = state.model.embed(state.pending[:, None])
        h = state.run(h, 0, self.depth(state.model.config.n_layers))
        tokens = sample(state.distribution(h), state.generator)
        return Round(tokens, torch.zeros_like(state.positions), drafted=0)
