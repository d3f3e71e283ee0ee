"""Drafting with the first E layers, until d tokens or until the draft is no longer sure.

LayerSkip (arXiv 2404.16710), section 4.3. Where to stop a draft: Draft & Verify (arXiv 2309.08168,
section 3.3) by the probability of its most probable token, DSSD (arXiv 2407.21082) by entropy.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.strategies.ngram import look_up
from inference.strategies.reduced_head import ReducedHead
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
    """x_E, each (batch, 1, dim), of the tokens run, from the pending one on: all that are drafted
    but the last, or fewer where some were not drafted by layers."""
    shallow: list[dict[int, Tensor]]
    """{l: x_{l+1}} of those, of the layers that were asked for."""


@dataclass(frozen=True)
class NgramDrafts:
    """Drafts that cost nothing, for the rows that have one."""

    tokens: Tensor
    """(batch, d) int64."""
    found: Tensor
    """(batch,) bool, which rows do."""
    vocab_size: int
    """Ids there are."""

    @cached_property
    def q(self) -> Tensor:
        """One-hot at the tokens: (batch, d, vocab)."""
        return F.one_hot(self.tokens, self.vocab_size).float()

    def in_place_of(self, q: Tensor, i: int) -> Tensor:
        """Return q: (batch, 1, vocab) of the drafted token i, one-hot in rows with a guess."""
        return torch.where(self.found[:, None, None], self.q[:, i : i + 1], q)

    def added_to(self, drafted: Draft, d: int) -> Draft:
        """Return a draft with d tokens in these rows, also where all others have ended before."""
        done, lengths = drafted.tokens.shape[1], drafted.lengths
        return replace(
            drafted,
            tokens=torch.cat((drafted.tokens, self.tokens[:, done:d]), dim=1),
            q=torch.cat((drafted.q, self.q[:, done:d]), dim=1),
            lengths=None if lengths is None else torch.where(self.found, d, lengths),
        )

    def alone(self) -> Draft:
        """Return them as a draft; the other rows draft nothing, and no layer is run."""
        lengths = self.tokens.shape[1] * self.found.long()
        return Draft(self.tokens, self.q, lengths, exits=[], shallow=[])


def lookup_drafts(state: DecodeState, ngram: int, d: int) -> NgramDrafts | None:
    """Guess d tokens from each row's own past; None if d or ngram is 0."""
    if not ngram or not d:
        return None
    tokens, found = look_up(state.batch.history[:, :-1], state.batch.positions, ngram, d)
    return NgramDrafts(tokens, found, state.model.config.vocab_size)


def draft(
    state: DecodeState,
    E: int,
    d: int,
    *,
    stop: StopRule = NEVER,
    tapped: tuple[int, ...] = (),
    skipped: SkippedParts = NOTHING,
    head: ReducedHead | None = None,
    guesses: NgramDrafts | None = None,
) -> Draft:
    """Decode d tokens, or fewer, with the first E layers, starting from the pending token.

    Tokens are drawn from q itself, whatever became of it: a part of the vocabulary, or a guess.

    Args:
        state: The batch.
        E: Layers to run.
        d: Most tokens to draft.
        stop: When a row ends before; the loop ends when all have.
        tapped: Layer indices l < E whose outputs are wanted as well.
        skipped: Parts of layers to leave out.
        head: The head drafts are drawn from, over a part of the vocabulary; None: all of it.
        guesses: d or more guesses, which their rows draft instead; these never stop.
    """
    batch, vocab = len(state.batch.pending), state.model.config.vocab_size
    tokens, exits, shallow = [state.batch.pending[:, None]], [], []
    q = [torch.empty(batch, 0, vocab, device=state.batch.pending.device)]
    sure = ~state.batch.finished if guesses is None else ~(state.batch.finished | guesses.found)
    lengths = torch.zeros_like(state.batch.positions)
    for i in range(d):
        x_E, taps = state.run_and_tap(
            state.model.embed(tokens[-1]), 0, E, offset=i, exit_layers=tapped, skipped=skipped
        )
        logits, probs = _from_head(state, state.before_head(x_E, E), head)
        q.append(probs if guesses is None else guesses.in_place_of(probs, i))
        tokens.append(sample(q[-1], state.generator))
        exits.append(x_E)
        shallow.append(taps)
        if not stop.never:
            lengths = lengths + sure
            sure = sure & stop.is_sure(logits)
            if i + 1 < d and not state.sync_bool(sure.any()):
                break
    counts = None if stop.never else lengths
    drafted = Draft(torch.cat(tokens, dim=1)[:, 1:], torch.cat(q, dim=1), counts, exits, shallow)
    return drafted if guesses is None else guesses.added_to(drafted, d)


def _from_head(state: DecodeState, x: Tensor, head: ReducedHead | None) -> tuple[Tensor, Tensor]:
    """Return the head's logits, and what tokens are drawn from over the whole vocabulary."""
    if head is None:
        logits = state.head(x)
        return logits, state.filtered(logits)
    logits = state.head(x, head.linear)
    return logits, head.widen(state.filtered(logits))
