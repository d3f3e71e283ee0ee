"""Layers left out by a fixed rule: Unified Layer Skipping, SkipDecode, LayerDrop's pruning.

No layer that was left out for a token is ever read by a later one, so nothing has to be filled in.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch

from inference.engine.sampling import sample
from inference.engine.state import Decoder, DecodeState, Round
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import one_by_one
from models.llama import SkippedParts, whole_layers
from models.token_depth import FallingBudget, falling_budget, unified_layers


def _keep_problems(strategy: "Unified | Pruned", otherwise: str, n_layers: int) -> list[str]:
    """Return what is wrong with the layers to keep; the setting `otherwise` may say them too."""
    keep = strategy.keep
    if not keep or not all(0 <= l < n_layers for l in keep):
        layers = "none" if not keep else "+".join(map(str, keep))
        return [
            f"keep: {layers}, {strategy.name} needs layers from 0 to {n_layers - 1} of this model"
        ]
    if keep != replace(strategy, keep=None).with_defaults(n_layers).keep:
        return strategy.unused_settings(otherwise, without="leaving keep out")
    return []


def _others(keep: tuple[int, ...] | None, n_layers: int) -> SkippedParts:
    assert keep is not None
    return whole_layers(set(range(n_layers)) - set(keep))


@dataclass(frozen=True, kw_only=True)
class Unified(Strategy):
    """Run the prompt through all layers and every new token through the same evenly spaced ones.

    Unified Layer Skipping (arXiv 2404.06954), see `models.token_depth.unified_layers`.
    """

    name: ClassVar[str] = "unified"
    speedup: float = 2.0
    """Layers of the model over layers run for a new token."""
    keep: tuple[int, ...] | None = None
    """Layers l to run; from the speedup if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with `keep` set."""
        if self.keep is not None or not self.speedup >= 1.0:
            return self
        return replace(self, keep=unified_layers(n_layers, self.speedup))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the layers."""
        if self.keep is None:
            return [f"speedup: {self.speedup}, unified needs at least 1"]
        return _keep_problems(self, "speedup", n_layers)

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        n_layers = state.model.config.n_layers
        return one_by_one(state, n_layers, _others(self.keep, n_layers))


@dataclass(frozen=True, kw_only=True)
class Pruned(Strategy):
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

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with `keep` set."""
        if self.keep is not None or self.every < 2:
            return self
        keep = tuple(l for l in range(n_layers) if l % self.every != self.every - 1)
        return replace(self, keep=keep)

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the layers."""
        if self.keep is None:
            return [f"every: {self.every}, pruned needs at least 2"]
        return _keep_problems(self, "every", n_layers)

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the layers that stay."""
        return n_layers, _others(self.keep, n_layers)

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        n_layers = state.model.config.n_layers
        return one_by_one(state, n_layers, _others(self.keep, n_layers))


@dataclass(frozen=True, kw_only=True)
class SkipDecode(Strategy):
    """Give later tokens fewer layers: the first few, and the topmost of what their budget leaves.

    SkipDecode (arXiv 2307.02628), see `models.token_depth.FallingBudget`.
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

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with both budgets set."""
        budget = falling_budget(
            n_layers, self.warmup, self.max_layers, self.min_layers, self.length
        )
        return replace(self, max_layers=budget.most, min_layers=budget.least)

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the budgets."""
        return self.budget.problems(n_layers)

    @property
    def budget(self) -> FallingBudget:
        """The rule, once both budgets are set."""
        assert self.max_layers is not None
        assert self.min_layers is not None
        return FallingBudget(
            warmup=self.warmup, most=self.max_layers, least=self.min_layers, length=self.length
        )

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the layers of the largest budget."""
        return n_layers, self.skipped(self.budget.most, n_layers)

    def skipped(self, budget: int, n_layers: int) -> SkippedParts:
        """Return the layers that a token of this budget leaves out."""
        return whole_layers(self.budget.left_out(budget, n_layers))

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        return partial(self._decode_one, state)

    def _decode_one(self, state: DecodeState, max_tokens: int) -> Round:
        """Run the layers that any row takes; a row keeps its state where it takes none.

        Such a row writes keys no later token of it will read: its budget never grows again.
        """
        n_layers, rule = state.model.config.n_layers, self.budget
        budgets = rule.at(state.positions - state.prompt_lengths)  # (batch,)
        h = state.model.embed(state.pending[:, None])
        # The largest and the smallest budget are the host's to know: one question for both.
        active = budgets.masked_fill(state.finished, rule.least)
        most, least = state.sync_list(torch.stack((active.max(), active.min())))
        some = rule.left_out(least, n_layers)[n_layers - most :]
        h = state.run(h, 0, some.stop, skipped=self.skipped(least, n_layers))
        for l in some:
            takes = rule.runs(l, budgets, n_layers)
            assert takes is not None
            h = torch.where(takes[:, None, None], state.run(h, l, l + 1), h)
        h = state.run(h, some.stop, n_layers)
        tokens = sample(state.distribution(h), state.generator)
        none = torch.zeros_like(state.positions)
        return Round(tokens, accepted=none, drafted=none, depths=budgets[:, None])
