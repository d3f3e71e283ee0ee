"""Layers left out by a fixed rule: Unified Layer Skipping, SkipDecode, LayerDrop's pruning.

No layer that was left out for a token is ever read by a later one, so nothing has to be filled in.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from inference.autoregressive import decode_one
from inference.sampling import sample
from inference.state import Decoder, DecodeState, Round
from models.llama import NOTHING, SkippedParts, whole_layers


def evenly_spaced(n_layers: int, kept: int) -> tuple[int, ...]:
    """Return `kept` layers l spread evenly, the first and the last among them.

    round(i (L - 1) / (n - 1)) for i = 0, ..., n - 1.
    """
    return tuple(round(i * (n_layers - 1) / (kept - 1)) for i in range(kept))


def _keep_problems(name: str, keep: tuple[int, ...] | None, n_layers: int) -> list[str]:
    if keep and all(0 <= l < n_layers for l in keep):
        return []
    layers = "none" if not keep else "+".join(map(str, keep))
    return [f"keep: {layers}, {name} needs layers from 0 to {n_layers - 1} of this model"]


def _others(keep: tuple[int, ...] | None, n_layers: int) -> SkippedParts:
    assert keep is not None
    return whole_layers(set(range(n_layers)) - set(keep))


@dataclass(frozen=True, kw_only=True)
class Unified:
    """Run the prompt through all layers and every new token through the same evenly spaced ones.

    Unified Layer Skipping (arXiv 2404.06954). A target speedup s keeps n = max(2, round(L / s))
    layers. The published rule takes every floor(L / (n - 1))-th layer, which divides by zero for
    s > L / 2 and leaves its remainder as one hole at the end; `evenly_spaced` does neither.
    """

    name: ClassVar[str] = "unified"
    speedup: float = 2.0
    """Layers of the model over layers run for a new token."""
    keep: tuple[int, ...] | None = None
    """Layers l to run; from the speedup if not given."""

    def filled(self, n_layers: int) -> "Unified":
        """Return a copy with `keep` set."""
        if self.keep is not None or not self.speedup >= 1.0:
            return self
        kept = min(n_layers, max(2, round(n_layers / self.speedup)))
        return replace(self, keep=evenly_spaced(n_layers, kept) if n_layers > 1 else (0,))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the layers."""
        if self.keep is None:
            return [f"speedup: {self.speedup}, unified needs at least 1"]
        return _keep_problems(self.name, self.keep, n_layers)

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return all layers."""
        return n_layers, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        n_layers = state.model.config.n_layers
        return partial(decode_one, state, n_layers, _others(self.keep, n_layers))


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Run prompt and new tokens through some layers alone, as a model without the others would.

    LayerDrop (arXiv 1909.11556), *Every Other*: for a pruning rate 1 / N every N-th layer goes. The
    paper drops depths d = 0 mod N counted from 0; ours drops l = N - 1 mod N, so that layer 0,
    which a Llama can least do without, stays.
    """

    name: ClassVar[str] = "pruned"
    every: int = 2
    """N: one layer of so many is left out."""
    keep: tuple[int, ...] | None = None
    """Layers l to run; from `every` if not given."""

    def filled(self, n_layers: int) -> "Pruned":
        """Return a copy with `keep` set."""
        if self.keep is not None or self.every < 2:
            return self
        keep = tuple(l for l in range(n_layers) if l % self.every != self.every - 1)
        return replace(self, keep=keep)

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the layers."""
        if self.keep is None:
            return [f"every: {self.every}, pruned needs at least 2"]
        return _keep_problems(self.name, self.keep, n_layers)

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the layers that stay."""
        return n_layers, _others(self.keep, n_layers)

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        n_layers = state.model.config.n_layers
        return partial(decode_one, state, n_layers, _others(self.keep, n_layers))


@dataclass(frozen=True, kw_only=True)
class SkipDecode:
    """Give later tokens fewer layers: the first few, and the topmost of what their budget leaves.

    SkipDecode (arXiv 2307.02628). The n-th new token, n from 0, has the budget
      e(n) = max - (max - min) min(n / length, 1), rounded,
    and runs layers 0, ..., W - 1 and the top e - W. A later token's layers are a subset of an
    earlier one's, so every key it looks for is there.
    """

    name: ClassVar[str] = "skipdecode"
    warmup: int = 1
    """W, the first layers, that every token runs."""
    max_layers: int | None = None
    """Layers of the prompt and the first new token; all if not given."""
    min_layers: int | None = None
    """Layers of the last tokens; half of the model's, rounded up, if not given."""
    length: int = 128
    """New tokens over which the budget falls; later ones stay at min_layers."""

    def filled(self, n_layers: int) -> "SkipDecode":
        """Return a copy with both budgets set."""
        most = n_layers if self.max_layers is None else self.max_layers
        least = min(most, (n_layers + 1) // 2) if self.min_layers is None else self.min_layers
        return replace(self, max_layers=most, min_layers=least)

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the budgets."""
        most, least = self._budgets()
        found = []
        if not 1 <= most <= n_layers:
            found.append(f"max_layers: {most}, skipdecode needs 1 to {n_layers} for this model")
        if not 1 <= least <= most:
            found.append(f"min_layers: {least}, skipdecode needs 1 to max_layers {most}")
        if not 0 <= self.warmup <= least:
            found.append(f"warmup: {self.warmup}, skipdecode needs 0 to min_layers {least}")
        if self.length < 1:
            found.append(f"length: {self.length}, skipdecode needs at least 1 token")
        return found

    def _budgets(self) -> tuple[int, int]:
        assert self.max_layers is not None
        assert self.min_layers is not None
        return self.max_layers, self.min_layers

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the layers of the largest budget."""
        return n_layers, self.skipped(self._budgets()[0], n_layers)

    def skipped(self, budget: int, n_layers: int) -> SkippedParts:
        """Return the layers that a token of this budget leaves out: those above the warmup."""
        return whole_layers(range(self.warmup, self.warmup + n_layers - budget))

    def budgets(self, new_tokens: Tensor) -> Tensor:
        """Return e(n) for n: int64 of any shape."""
        most, least = self._budgets()
        fall = (new_tokens.double() / self.length).clamp(0.0, 1.0)
        return (most - (most - least) * fall).round().long()

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        return partial(self._decode_one, state)

    def _decode_one(self, state: DecodeState, room: int) -> Round:
        """Run the layers that any row takes; a row keeps its state where it takes none.

        Such a row writes keys no later token of it will read: its budget never grows again.
        """
        n_layers = state.model.config.n_layers
        budgets = self.budgets(state.positions - state.prompt_lengths)  # (batch,)
        h = state.model.embed(state.pending[:, None])
        # The largest and the smallest budget are the host's to know: one question for both.
        state.work.syncs += 1
        active = budgets.masked_fill(state.finished, self._budgets()[1])
        most, least = torch.stack((active.max(), active.min())).tolist()
        first_shared = self.warmup + n_layers - least
        h = state.run(h, 0, first_shared, skipped=self.skipped(least, n_layers))
        for l in range(self.warmup + n_layers - most, first_shared):
            takes = l >= self.warmup + n_layers - budgets
            h = torch.where(takes[:, None, None], state.run(h, l, l + 1), h)
        h = state.run(h, first_shared, n_layers)
        tokens = sample(state.distribution(h), state.generator)
        none = torch.zeros_like(state.positions)
        return Round(tokens, accepted=none, drafted=none, depths=budgets[:, None])
