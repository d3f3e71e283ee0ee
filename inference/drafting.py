"""Drafting with the first E layers, until d tokens or until the draft is no longer sure.

LayerSkip (arXiv 2404.16710), section 4.3. Where to stop a draft: Draft & Verify (arXiv 2309.08168,
section 3.3) by the probability of its most probable token, DSSD (arXiv 2407.21082) by entropy.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inference.sampling import sample
from inference.state import DecodeState
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True)
class Stop:
    """When a row's draft ends before d tokens: after a token the draft was not sure of."""

    probability: float = 0.0
    """Least probability of the most probable token, at temperature 1; 0 never stops."""
    entropy: float = float("inf")
    """Most entropy in nats, at temperature 1; infinity never stops."""

    @property
    def never(self) -> bool:
        """Whether every draft has d tokens."""
        return self.probability <= 0.0 and self.entropy == float("inf")

    def is_sure(self, logits: Tensor) -> Tensor:
        """Return (batch,) bool for logits: (batch, 1, vocab)."""
        probs = logits[:, 0].float().softmax(-1)
        sure = probs.amax(-1) >= self.probability
        if self.entropy < float("inf"):
            sure &= torch.special.entr(probs).sum(-1) <= self.entropy
        return sure


NEVER = Stop()


class StopRule(Protocol):
    """When a row's draft ends: a `Stop`, or one that learns."""

    @property
    def never(self) -> bool:
        """Whether every draft has d tokens."""
        ...

    def is_sure(self, logits: Tensor) -> Tensor:
        """Return (batch,) bool for logits: (batch, 1, vocab)."""
        ...


@dataclass(frozen=True)
class Draft:
    """What was drafted after each row's pending token."""

    tokens: Tensor
    """(batch, d) int64."""
    q: Tensor
    """(batch, d, vocab), what each was drawn from."""
    lengths: Tensor | None
    """(batch,) int64, how many of a row's count; None: all."""
    exits: list[Tensor]
    """x_E, each (batch, 1, dim), of the tokens run: the pending one and all drafted but the last.
    Empty if no layer was run."""
    shallow: list[dict[int, Tensor]]
    """{l: x_{l+1}} of those, of the layers that were asked for."""


def draft(
    state: DecodeState,
    E: int,
    d: int,
    *,
    stop: StopRule = NEVER,
    tapped: tuple[int, ...] = (),
    skipped: SkippedParts = NOTHING,
) -> Draft:
    """Decode d tokens, or fewer, with the first E layers, starting from the pending token.

    Args:
        state: The batch.
        E: Layers to run.
        d: Most tokens to draft.
        stop: When a row ends before; the loop ends when all have.
        tapped: Layer indices l < E whose outputs are wanted as well.
        skipped: Parts of layers to leave out.
    """
    batch, vocab = len(state.pending), state.model.config.vocab_size
    tokens, exits, shallow = [state.pending[:, None]], [], []
    q = [torch.empty(batch, 0, vocab, device=state.pending.device)]
    lengths, sure = torch.zeros_like(state.positions), ~state.finished
    for i in range(d):
        x_E, taps = state.run_and_tap(
            state.model.embed(tokens[-1]), 0, E, offset=i, exit_layers=tapped, skipped=skipped
        )
        logits = state.logits(x_E)
        q.append(state.filtered(logits))
        tokens.append(sample(q[-1], state.generator))
        exits.append(x_E)
        shallow.append(taps)
        if not stop.never:
            lengths = lengths + sure
            sure = sure & stop.is_sure(logits)
            if i + 1 < d and not state.ask(sure.any()):
                break
    return Draft(
        tokens=torch.cat(tokens, dim=1)[:, 1:],
        q=torch.cat(q, dim=1),
        lengths=None if stop.never else lengths,
        exits=exits,
        shallow=shallow,
    )
