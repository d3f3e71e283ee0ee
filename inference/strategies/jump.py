"""Static early exit through a linear map in place of the later layers: Jump to Conclusions."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

from inference.engine.batch import Round
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.early_exit import default_exit
from inference.strategies.jump_maps import JumpMap, load_jump
from models.llama import NOTHING, SkippedParts

FITTED_BY = "give a file that python -m inference.fit_jump wrote"


@dataclass(frozen=True, kw_only=True)
class Jump(Strategy):
    """Decode with the first E layers and a linear map in place of the others.

    Jump to Conclusions (arXiv 2303.09435). As in `early_exit`, later layers never run and their
    part of the KV cache is never read.
    """

    name: ClassVar[str] = "jump"
    path: Path | None = None
    """The map: a file that inference.fit_jump wrote."""
    E: int | None = None
    """Layers to run, 1 to n_layers; a quarter of the model's if not given."""

    def with_defaults(self, n_layers: int) -> Self:
        return replace(self, E=self.E if self.E is not None else default_exit(n_layers))

    def problems(self, n_layers: int) -> list[str]:
        found = [] if self.path is not None else [f"path: none, {FITTED_BY}"]
        if self.E is None or not 1 <= self.E <= n_layers:
            found.append(f"E: {self.E}, jump needs 1 to {n_layers} for this model")
        return found

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        assert self.E is not None
        return self.E, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        assert self.path is not None
        jump = load_jump(self.path, state.model)
        return GraphableDecoder(1, partial(self._decode_one, state, jump))

    def _decode_one(self, state: DecodeState, jump: JumpMap, max_tokens: int) -> Round:
        assert self.E is not None
        h = state.run(state.embed_pending(), 0, self.E)
        return Round.plain(sample(state.distribution(jump(self.E, h)), state.generator))
