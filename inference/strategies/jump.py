"""Linear maps from an exit's state to what the last layer would make of it, and static exit.

Jump to Conclusions (arXiv 2303.09435), section 3: A_l = argmin_A sum ||A h_l - h_L||^2, and the
exit predicts with head(norm(A_l h_l)). Ours is written A = I + B, so that a ridge pulls it towards
no map at all, and a map of low rank is one whose B is. `inference.fit_jump` fits them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.engine.sampling import sample
from inference.engine.state import Decoder, DecodeState, GraphableDecoder, Round
from inference.engine.strategy import Strategy
from inference.loading.adapters import load_adapter, save_adapter
from inference.strategies.autoregressive import a_quarter
from models.llama import NOTHING, Llama, SkippedParts

FITTED_BY = "give a file that python -m inference.fit_jump wrote"


@dataclass(frozen=True)
class JumpMap:
    """The maps of all exits; at the last layer it is the identity."""

    tensors: Mapping[str, Tensor]
    """By E: "E.B", (dim, dim), or "E.out", (dim, r), and "E.in", (r, dim), with B = out in."""

    def __call__(self, E: int, h: Tensor) -> Tensor:
        """Return A h for h = x_E: (..., dim)."""
        if f"{E}.B" in self.tensors:
            return h + F.linear(h, self.tensors[f"{E}.B"])
        if f"{E}.in" in self.tensors:
            return h + F.linear(F.linear(h, self.tensors[f"{E}.in"]), self.tensors[f"{E}.out"])
        return h


def save_jump(path: Path, jump: JumpMap, model: Llama, settings: Mapping[str, str]) -> None:
    """Write maps fitted to `model`."""
    tensors = {name: t.to(model.norm.weight.dtype) for name, t in jump.tensors.items()}
    save_adapter(path, "jump", model, tensors, settings)


def load_jump(path: Path, model: Llama) -> JumpMap:
    """Read maps.

    Raises:
        ValueError: there are none, or they were fitted to other weights.
    """
    return JumpMap(load_adapter(path, "jump", model)[0])


@dataclass(frozen=True, kw_only=True)
class Jump(Strategy):
    """Decode with the first E layers and a linear map in place of the others.

    As in `early_exit`, later layers never run and their part of the KV cache is never read.
    """

    name: ClassVar[str] = "jump"
    path: Path | None = None
    """The map: a file that inference.fit_jump wrote."""
    E: int | None = None
    """Layers to run, 1 to n_layers; a quarter of the model's if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with E set."""
        return replace(self, E=self.E if self.E is not None else a_quarter(n_layers))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = [] if self.path is not None else [f"path: none, {FITTED_BY}"]
        if self.E is None or not 1 <= self.E <= n_layers:
            found.append(f"E: {self.E}, jump needs 1 to {n_layers} for this model")
        return found

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the first E layers."""
        assert self.E is not None
        return self.E, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        assert self.path is not None
        jump = load_jump(self.path, state.model)
        return GraphableDecoder(1, partial(self._decode_one, state, jump))

    def _decode_one(self, state: DecodeState, jump: JumpMap, max_tokens: int) -> Round:
        assert self.E is not None
        h = state.run(state.model.embed(state.pending[:, None]), 0, self.E)
        tokens = sample(state.distribution(jump(self.E, h)), state.generator)
        none = torch.zeros_like(state.positions)
        return Round(tokens, accepted=none, drafted=none)
