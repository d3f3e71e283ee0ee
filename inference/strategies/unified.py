"""Unified Layer Skipping (arXiv 2404.06954): new tokens run the same evenly spaced layers."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch

from inference.engine.batch import Round
from inference.engine.counters import Counters
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import decode_one
from inference.strategies.kept_layers import keep_problems, other_layers
from models.llama import SkippedParts
from models.token_depth import speedup_problems, unified_layers


@dataclass(frozen=True, kw_only=True)
class Unified(Strategy):
    """Run the prompt through all layers and every new token through the same evenly spaced ones.

    Unified Layer Skipping (arXiv 2404.06954), see `models.token_depth.unified_layers`. The last
    token of the prompt runs all layers too: the first new token is the full model's.
    """

    name: ClassVar[str] = "unified"
    speedup: float = 2.0
    """Layers of the model over layers run for a new token, at most n_layers / 2; the nearest that
    whole layers reach."""
    keep: tuple[int, ...] | None = None
    """Layers l to run; derived from the speedup if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        if self.keep is not None or speedup_problems(n_layers, self.speedup):
            return self
        return replace(self, keep=unified_layers(n_layers, self.speedup))

    def problems(self, n_layers: int) -> list[str]:
        if self.keep is None:
            return speedup_problems(n_layers, self.speedup)
        default = replace(self, keep=None).with_defaults(n_layers).keep
        return keep_problems(self, self.keep, n_layers, default=default, setting="speedup")

    def remark(self, counters: Counters) -> str:
        """Return the speedup that whole layers reach, if it is not the one asked for."""
        n_layers = max((stop for _, stop, _ in counters.passes), default=1)
        derived = unified_layers(n_layers, self.speedup)
        kept = len(derived)
        if self.keep not in (None, derived) or kept * self.speedup == n_layers:
            return ""
        reached = f"{n_layers / kept:.3g} is reached, with {kept} of {n_layers} layers"
        return f"speedup: {self.speedup:g}, {reached}"

    def start(self, state: DecodeState) -> Decoder:
        assert self.keep is not None
        skipped = other_layers(self.keep, state.model.config.n_layers)
        later = partial(decode_one, state, state.model.config.n_layers, skipped)
        return GraphableDecoder(1, later, _FirstRounds(state, skipped))


class _FirstRounds:
    """The rounds after prompts were put into rows: these run their last token in all layers."""

    def __init__(self, state: DecodeState, skipped: SkippedParts) -> None:
        self._state, self._skipped = state, skipped
        self._prefills = 0
        """`num_prefills` of the batch at the last of these rounds."""

    def __call__(self, max_tokens: int) -> Round | None:
        """Return such a round, or None where no prompt is new."""
        state, batch = self._state, self._state.batch
        if self._prefills == batch.num_prefills:
            return None
        self._prefills = batch.num_prefills
        n_layers, h = state.model.config.n_layers, state.embed_pending()
        if len(batch) == 1:
            h = state.run(h, 0, n_layers)
        else:
            ends_prompt = (batch.new_tokens == 0)[:, None, None]
            for l in range(n_layers):
                out = state.run(h, l, l + 1)
                h = torch.where(ends_prompt, out, h) if l in self._skipped.attention else out
        return Round.plain(sample(state.distribution(h), state.generator))
