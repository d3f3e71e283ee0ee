"""Plain decoding: one token a round, from all layers."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from inference.engine.batch import Round
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Strategy):
    """Decode with all layers."""

    name: ClassVar[str] = "autoregressive"

    @property
    def lossless(self) -> bool:
        return True

    def start(self, state: DecodeState) -> Decoder:
        return one_by_one(state, state.model.config.n_layers, NOTHING)


def one_by_one(state: DecodeState, depth: int, skipped: SkippedParts) -> Decoder:
    """Return a decoder of one token a round from the first `depth` layers, less those skipped."""
    return GraphableDecoder(1, partial(decode_one, state, depth, skipped))


def decode_one(state: DecodeState, depth: int, skipped: SkippedParts, max_tokens: int) -> Round:
    """Decode one token of each row from the first `depth` layers, less those skipped."""
    h = state.run(state.embed_pending(), 0, depth, skipped=skipped)
    return Round.plain(sample(state.distribution(h, depth), state.generator))
