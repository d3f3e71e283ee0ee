"""SkipDecode (arXiv 2307.02628): later tokens run fewer layers.

No later token reads a layer that an earlier one left out, so no keys have to be filled in.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch

from inference.engine.batch import Round
from inference.engine.decoder import Decoder
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from models.llama import SkippedParts, whole_layers
from models.token_depth import FallingBudget, falling_budget


@dataclass(frozen=True, kw_only=True)
class SkipDecode(Strategy):
    """Run fewer layers for later tokens: the first few, and the topmost that their budget allows.

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
        budget = falling_budget(
            n_layers, self.warmup, self.max_layers, self.min_layers, self.length
        )
        return replace(self, max_layers=budget.most, min_layers=budget.least)

    def problems(self, n_layers: int) -> list[str]:
        return self.budget.problems(n_layers)

    @property
    def budget(self) -> FallingBudget:
        """The layers of each new token, once both settings are filled in."""
        assert self.max_layers is not None
        assert self.min_layers is not None
        return FallingBudget(
            warmup=self.warmup, most=self.max_layers, least=self.min_layers, length=self.length
        )

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        return n_layers, self.skipped(self.budget.most, n_layers)

    def skipped(self, budget: int, n_layers: int) -> SkippedParts:
        """Return the layers l that a token of this budget leaves out."""
        return whole_layers(self.budget.left_out(budget, n_layers))

    def start(self, state: DecodeState) -> Decoder:
        return partial(self._decode_one, state)

    def _decode_one(self, state: DecodeState, max_tokens: int) -> Round:
        """Run the layers of any row's budget; rows without one in theirs keep their state there.

        Such a row writes keys that no later token of it reads: its budget never grows again.
        """
        n_layers, rule, batch = state.model.config.n_layers, self.budget, state.batch
        budgets = rule.at(batch.positions - batch.prompt_lengths)  # (batch,)
        h = state.embed_pending()
        # The host needs the largest and the smallest budget: one sync for both.
        active = budgets.masked_fill(batch.finished, rule.least)
        most, least = state.sync_list(torch.stack((active.max(), active.min())))
        some = rule.left_out(least, n_layers)[n_layers - most :]
        h = state.run(h, 0, some.stop, skipped=self.skipped(least, n_layers))
        for l in some:
            takes = rule.runs(l, budgets, n_layers)
            assert takes is not None
            h = torch.where(takes[:, None, None], state.run(h, l, l + 1), h)
        h = state.run(h, some.stop, n_layers)
        return Round.plain(sample(state.distribution(h), state.generator), budgets)
