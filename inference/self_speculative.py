"""Self-speculative decoding: the first E layers draft, the others verify, one KV cache serves both.

LayerSkip (arXiv 2404.16710), section 4.3. E = number of layers run to draft, d = tokens drafted,
L = n_layers; x_E = output of layer E - 1, the paper's "exit query". Drafted tokens keep x_E, so
verification runs only layers E, ..., L - 1 on them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from inference.autoregressive import a_quarter
from inference.sampling import accept, sample
from inference.state import Decoder, DecodeState, Round
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative:
    """Draft d tokens with the first E layers, then verify them with the rest."""

    name: ClassVar[str] = "self_speculative"
    E: int | None = None
    """Layers that draft, 1 to n_layers - 1; a quarter of the model's if not given."""
    d: int = 4
    """Tokens drafted in a round, at least 1; fewer where fewer are left to decode."""

    def filled(self, n_layers: int) -> "SelfSpeculative":
        """Return a copy with E set."""
        return replace(self, E=self.E if self.E is not None else a_quarter(n_layers))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with E and d."""
        found = []
        if n_layers == 1:
            found.append("strategy: self_speculative needs at least 2 layers, this model has 1")
        elif self.E is None or not 1 <= self.E < n_layers:
            found.append(f"E: {self.E}, self_speculative needs 1 to {n_layers - 1} for this model")
        if self.d < 1:
            found.append(f"d: {self.d}, give at least 1 drafted token")
        return found

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return all layers: verification uses them."""
        return n_layers, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        assert self.E is not None
        return partial(speculate, state, self.E, self.d)


def speculate(state: DecodeState, E: int, d: int, room: int) -> Round:
    """Draft, verify, accept: 1 to d + 1 tokens for every row, at most `room`."""
    draft_tokens, q, exits = draft(state, E, min(d, room - 1))
    p = verify(state, E, draft_tokens, exits)
    accepted, next_token = accept(draft_tokens, q, p, state.generator)
    tokens = torch.cat((draft_tokens, next_token[:, None]), dim=1)
    tokens.scatter_(1, accepted[:, None], next_token[:, None])
    return Round(tokens, accepted, drafted=torch.full_like(accepted, draft_tokens.shape[1]))


def draft(state: DecodeState, E: int, d: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Decode d tokens with the first E layers, starting from the pending token.

    Returns:
        The drafted tokens, (batch, d) int64; their distributions q, (batch, d, vocab); and x_E,
        each (batch, 1, dim), of the tokens run: the pending one and all drafted but the last.
    """
    batch, vocab = len(state.pending), state.model.config.vocab_size
    tokens, exits = [state.pending[:, None]], []
    q = [torch.empty(batch, 0, vocab, device=state.pending.device)]
    for i in range(d):
        x_E = state.run(state.model.embed(tokens[-1]), 0, E, offset=i)
        q.append(state.distribution(x_E))
        tokens.append(sample(q[-1], state.generator))
        exits.append(x_E)
    return torch.cat(tokens, dim=1)[:, 1:], torch.cat(q, dim=1), exits


def verify(state: DecodeState, E: int, draft_tokens: Tensor, exits: list[Tensor]) -> Tensor:
    """Give the full model's distribution after the pending token and after each drafted one.

    The last drafted token has not been run yet: it goes through the first E layers, then all
    d + 1 tokens through layers E, ..., L - 1 in one pass.

    Args:
        state: The batch.
        E: Layers that drafted.
        draft_tokens: (batch, d) int64.
        exits: d tensors x_E, each (batch, 1, dim), from `draft`.

    Returns:
        p: (batch, d + 1, vocab).
    """
    last = torch.cat((state.pending[:, None], draft_tokens), dim=1)[:, -1:]
    x_E = state.run(state.model.embed(last), 0, E, offset=len(exits))
    x_L = state.run(torch.cat((*exits, x_E), dim=1), E, state.model.config.n_layers)
    return state.distribution(x_L)
