"""Plain decoding of a model with routers, without the layers they leave out.

Every strategy follows the routers of a model that has them; this one also saves the compute. Where
no row runs a layer, its keys and values alone are computed.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from inference.engine.batch import Round
from inference.engine.decoder import Decoder
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from models.router import runs


@dataclass(frozen=True, kw_only=True)
class Routed(Strategy):
    """Run each layer if the router of any row does: the same tokens as autoregressive."""

    name: ClassVar[str] = "routed"

    def start(self, state: DecodeState) -> Decoder:
        if state.model.config.router == "none":
            raise ValueError(
                "strategy: routed needs a model with routers and this one has none, give another "
                "or train one with --model.router linear"
            )
        return partial(_decode_one, state)


def _decode_one(state: DecodeState, max_tokens: int) -> Round:
    h = state.embed_pending()
    depths = torch.zeros_like(state.batch.positions)
    for l in range(state.model.config.n_layers):
        p = state.model.gate(l, h)
        assert p is not None
        takes = runs(p[:, 0])
        depths += takes
        if state.sync_bool((takes & ~state.batch.finished).any()):
            h = state.run(h, l, l + 1)  # which keeps the state of rows whose router skips it
        else:
            state.write_keys_and_values(h, l, l + 1)
    return Round.plain(sample(state.distribution(h), state.generator), depths)
