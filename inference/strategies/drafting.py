"""Drafting with the first E layers, until d tokens or until the draft is no longer confident.

LayerSkip (arXiv 2404.16710), section 4.3. When to stop a draft: Draft & Verify (arXiv 2309.08168,
section 3.3) by the probability of its most probable token, DSSD (arXiv 2407.21082) by entropy.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.engine.candidates import draw_candidates
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.strategies.ngram import look_up
from inference.strategies.reduced_head import ReducedHead
from models.llama import NOTHING, SkippedParts


class StopRule(Protocol):
    """When a row's draft ends before d tokens: after the first token that is not confident."""

    @property
    def never(self) -> bool:
        """Whether every draft has d tokens."""
        ...

    def is_confident(self, logits: Tensor) -> Tensor:
        """Return (batch,) bool for logits: (batch, 1, vocab)."""
        ...


@dataclass(frozen=True)
class Stop:
    """A stop rule of fixed thresholds."""

    probability: float = 0.0
    """Least probability of the most probable token, at temperature 1; 0 never stops."""
    entropy: float = float("inf")
    """Most entropy in nats, at temperature 1; infinity never stops."""

    @property
    def never(self) -> bool:
        return self.probability <= 0.0 and self.entropy == float("inf")

    def is_confident(self, logits: Tensor) -> Tensor:
        probs = logits[:, 0].float().softmax(-1)
        confident = probs.amax(-1) >= self.probability
        if self.entropy < float("inf"):
            confident &= torch.special.entr(probs).sum(-1) <= self.entropy
        return confident


NEVER = Stop()


@dataclass(frozen=True)
class Draft:
    """The tokens drafted after each row's pending one."""

    tokens: Tensor
    """(batch, d) int64."""
    q: Tensor | None
    """(batch, d, vocab), the distribution each was drawn from; None when greedy."""
    lengths: Tensor | None
    """(batch,) int64, tokens of each row that count; None: all."""
    exits: list[Tensor]
    """x_E, each (batch, 1, dim), of the tokens that ran through E layers, from the pending one on:
    all drafted ones but the last, or fewer where n-gram drafts follow."""
    taps: list[dict[int, Tensor]]
    """{l: x_{l+1}} of the same tokens, for the layers l that were tapped."""
    leaves: Tensor | None = None
    """(batch, d, branch - 1) int64, further candidates for each token; None: there are none."""
    given: Tensor | None = None
    """(batch,) bool, rows whose tokens n-gram lookups gave; None: with leaves, no row. Their leaves
    are drawn from q without these."""


@dataclass(frozen=True)
class NgramDrafts:
    """Drafts from n-gram lookup, for the rows where one was found."""

    tokens: Tensor
    """(batch, d) int64."""
    found: Tensor
    """(batch,) bool, the rows where the tokens count."""
    vocab_size: int
    greedy: bool

    @cached_property
    def q(self) -> Tensor:
        """One-hot at the tokens: (batch, d, vocab)."""
        return F.one_hot(self.tokens, self.vocab_size).float()

    def override(self, tokens: Tensor, q: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Return the rows' own drafted token i, where they have one, and its distribution.

        Args:
            tokens: (batch, 1) int64, as drafted.
            q: (batch, 1, vocab), what they were drawn from.
            i: From 0.
        """
        tokens = torch.where(self.found[:, None], self.tokens[:, i : i + 1], tokens)
        if self.greedy:
            return tokens, q
        return tokens, torch.where(self.found[:, None, None], self.q[:, i : i + 1], q)

    def candidates(self, state: DecodeState, weights: Tensor, i: int, branch: int) -> Tensor:
        """Return candidates (batch, 1, branch) for token i: where there is a lookup, it is first.

        Args:
            state: The batch.
            weights: (batch, 1, vocab), what the others are drawn from, without it.
            i: From 0.
            branch: At least 2.
        """
        found, token = self.found[:, None, None], self.tokens[:, i : i + 1, None]
        nothing = -torch.inf if self.greedy else 0.0
        weights = torch.where(found, weights.scatter(-1, token, nothing), weights)
        drawn = draw_candidates(weights, branch, state.generator)
        return torch.where(found, torch.cat((token, drawn[..., :-1]), dim=-1), drawn)

    def extend(self, drafted: Draft, d: int) -> Draft:
        """Return a draft with d tokens in these rows, where all others may have stopped before.

        From there on it has no leaves: they are the tokens again, which come to nothing.
        """
        done, lengths, leaves = drafted.tokens.shape[1], drafted.lengths, drafted.leaves
        rest, q = self.tokens[:, done:d], drafted.q
        if leaves is not None:
            leaves = torch.cat((leaves, rest[..., None].expand(-1, -1, leaves.shape[2])), dim=1)
        if q is not None:
            ahead = self.q[:, done:d]
            q = torch.cat((q, ahead if leaves is None else torch.zeros_like(ahead)), dim=1)
        return replace(
            drafted,
            tokens=torch.cat((drafted.tokens, rest), dim=1),
            q=q,
            lengths=None if lengths is None else torch.where(self.found, d, lengths),
            leaves=leaves,
            given=None if leaves is None else self.found,
        )

    def as_draft(self) -> Draft:
        """Return a draft of these rows alone, for which no layer runs."""
        lengths = self.tokens.shape[1] * self.found.long()
        q = None if self.greedy else self.q
        return Draft(self.tokens, q, lengths, exits=[], taps=[])


def lookup_drafts(state: DecodeState, ngram: int, d: int) -> NgramDrafts | None:
    """Draft d tokens by n-gram lookup in each row's own past; None if d or ngram is 0."""
    if not ngram or not d:
        return None
    tokens, found = look_up(state.batch.history[:, :-1], state.batch.positions, ngram, d)
    vocab_size, greedy = state.model.config.vocab_size, state.generator is None
    return NgramDrafts(tokens, found, vocab_size, greedy)


def draft(
    state: DecodeState,
    E: int,
    d: int,
    *,
    stop: StopRule = NEVER,
    tapped: tuple[int, ...] = (),
    skipped: SkippedParts = NOTHING,
    head: ReducedHead | None = None,
    lookups: NgramDrafts | None = None,
    branch: int = 1,
) -> Draft:
    """Decode d tokens, or fewer, with the first E layers, starting from the pending token.

    Tokens are drawn from the returned q itself, of a part of the vocabulary and of lookups too; but
    with leaves, q is the exit's alone.

    Args:
        state: The batch.
        E: Layers to run.
        d: Most tokens to draft.
        stop: When a row's draft ends before; the loop ends when all have.
        tapped: Layer indices l < E whose outputs are returned as well.
        skipped: Parts of layers to leave out.
        head: The head drafts are drawn from, over a part of the vocabulary; None: all of it.
        lookups: d or more tokens that their rows draft instead; these never stop.
        branch: Candidates for each token, the drafted one included.
    """
    tokens, leaves, exits, taps = [state.batch.pending[:, None]], [], [], []
    q = [state.model.norm.weight.new_empty(len(state.batch), 0, state.model.config.vocab_size)]
    lengths = None if stop.never else _RowLengths(state, stop, lookups)
    for i in range(d):
        x_E, tap = state.run_and_tap(
            state.model.embed(tokens[-1]), 0, E, offset=i, exit_layers=tapped, skipped=skipped
        )
        logits, probs = _from_head(state, state.before_head(x_E, E), head)
        token, probs, others = _draw(state, probs, branch, lookups, i)
        tokens.append(token)
        leaves += others
        q.append(probs)
        exits.append(x_E)
        taps.append(tap)
        if lengths is not None and lengths.all_ended(logits, is_last=i + 1 == d):
            break
    all_q = None if state.generator is None else torch.cat(q, dim=1)
    all_leaves = torch.cat(leaves, dim=1) if leaves else None
    counts = None if lengths is None else lengths.counts
    drafted = Draft(torch.cat(tokens, dim=1)[:, 1:], all_q, counts, exits, taps, all_leaves)
    return drafted if lookups is None else lookups.extend(drafted, d)


class _RowLengths:
    """How many tokens of each row's draft count, where a rule may end it."""

    def __init__(self, state: DecodeState, stop: StopRule, lookups: NgramDrafts | None) -> None:
        self._state, self._stop = state, stop
        finished = state.batch.finished
        self._active = ~finished if lookups is None else ~(finished | lookups.found)
        self.counts = torch.zeros_like(state.batch.positions)
        """(batch,) int64."""

    def all_ended(self, logits: Tensor, *, is_last: bool) -> bool:
        """Count a token drawn from logits, (batch, 1, vocab); return whether no row goes on."""
        self.counts = self.counts + self._active
        self._active = self._active & self._stop.is_confident(logits)
        return is_last or not self._state.sync_bool(self._active.any())


def _draw(
    state: DecodeState, weights: Tensor, branch: int, lookups: NgramDrafts | None, i: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Draw token i, (batch, 1), and other candidates, [(batch, 1, branch - 1)] or [].

    Returns:
        The token, the weights it was drawn from, or with others they were, and the others.
    """
    if branch == 1:
        token = sample(weights, state.generator)
        if lookups is not None:
            token, weights = lookups.override(token, weights, i)
        return token, weights, []
    if lookups is None:
        candidates = draw_candidates(weights, branch, state.generator)
    else:
        candidates = lookups.candidates(state, weights, i, branch)
    return candidates[..., 0], weights, [candidates[..., 1:]]


def _from_head(state: DecodeState, x: Tensor, head: ReducedHead | None) -> tuple[Tensor, Tensor]:
    """Return the head's logits, and what tokens of the whole vocabulary are drawn from."""
    if head is None:
        logits = state.head(x)
        return logits, state.filtered(logits)
    logits = state.head(x, head.linear)
    if state.generator is None:
        return logits, state.filtered(head.widen(logits, -torch.inf))
    return logits, head.widen(state.filtered(logits), 0.0)
