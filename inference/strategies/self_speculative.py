"""Self-speculative decoding: the first E layers draft, the others verify, one KV cache serves both.

LayerSkip (arXiv 2404.16710), section 4.3. E = number of layers run to draft, d = tokens drafted,
L = n_layers; x_E = output of layer E - 1, the paper's "exit query". Drafted tokens keep x_E, so
verification runs only layers E, ..., L - 1 on them.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.sampling import accept
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.drafting import Draft, Stop, draft, lookup_drafts
from inference.strategies.early_exit import default_exit
from inference.strategies.reduced_head import COUNT_THEM, ReducedHead, load_reduced_head
from inference.strategies.tree import accept_tree, check_branch, verify_tree


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Strategy):
    """Draft up to d tokens with the first E layers, then verify them with the rest."""

    name: ClassVar[str] = "self_speculative"
    E: int | None = None
    """Layers that draft, 1 to n_layers - 1; a quarter of the model's if not given."""
    d: int = 4
    """Tokens drafted in a round, at least 1; fewer where fewer are left to decode."""
    stop: float = 0.0
    """A row's draft ends after a token whose distribution has no probability as large as this;
    0: never."""
    stop_entropy: float = float("inf")
    """A row's draft ends after a token whose distribution has more entropy, in nats."""
    ngram: int = 0
    """n-gram lookup: where the last so many tokens of a row, or fewer but at least 2, came before,
    the tokens after them are its draft; no layer drafts if all rows have a lookup; 0: no lookup."""
    branch: int = 1
    """Candidates for each token that layers draft: the exit's next-best are verified in the same
    pass, and one of them takes the place of a drafted token that is wrong."""
    draft_vocab: int = 0
    """Drafts are drawn from so many tokens, the most frequent ones (FR-Spec, arXiv 2502.14856); 0:
    from all."""
    token_counts: Path | None = None
    """Counts of each token, a file of `python -m inference.frequent_tokens`."""

    @property
    def lossless(self) -> bool:
        return True

    def with_defaults(self, n_layers: int) -> Self:
        return replace(self, E=self.E if self.E is not None else default_exit(n_layers))

    def problems(self, n_layers: int) -> list[str]:
        found = []
        if n_layers == 1:
            found.append(f"strategy: {self.name} needs 2 layers and this model has 1, leave it out")
        elif self.E is None or not 1 <= self.E < n_layers:
            found.append(f"E: {self.E}, self_speculative needs 1 to {n_layers - 1} for this model")
        found += self.below(1, d="drafted token")
        found += self.below(1, branch="candidate")
        if self.draft_vocab < 0:
            found.append(f"draft_vocab: {self.draft_vocab}, give a number of tokens, or 0 for all")
        if self.draft_vocab and self.token_counts is None:
            found.append(f"token_counts: none, draft_vocab needs them, {COUNT_THEM}")
        if self.token_counts is not None and not self.draft_vocab:
            found.append("draft_vocab: 0, token_counts are for drafts from fewer tokens, give both")
        return found + draft_problems(self.stop, self.stop_entropy, self.ngram)

    @property
    def always_drafts(self) -> bool:
        """Whether each round drafts d tokens with E layers, as the speedup bound assumes."""
        plain = not self.ngram and not self.draft_vocab and self.branch == 1
        return plain and Stop(self.stop, self.stop_entropy).never

    def spare_slots(self, slots: int) -> int:
        return min(self.d, slots - 1) * (self.branch - 1)

    def start(self, state: DecodeState) -> Decoder:
        check_branch(self.branch, self.draft_vocab or state.model.config.vocab_size)
        head = None
        if self.token_counts is not None:
            head = load_reduced_head(state.model, self.token_counts, self.draft_vocab)
        rounds = partial(self._round, state, head)
        syncs = self.ngram or not Stop(self.stop, self.stop_entropy).never
        return rounds if syncs else GraphableDecoder(self.d + 1, rounds)

    def _round(self, state: DecodeState, head: ReducedHead | None, max_tokens: int) -> Round:
        """Draft, verify, accept: 1 to d + 1 tokens for every row, at most `max_tokens`."""
        assert self.E is not None
        d = min(self.d, max_tokens - 1)
        lookups = lookup_drafts(state, self.ngram, d)
        if lookups is not None and state.sync_bool((lookups.found | state.batch.finished).all()):
            drafted = lookups.as_draft()
        else:
            stop = Stop(self.stop, self.stop_entropy)
            drafted = draft(
                state, self.E, d, stop=stop, head=head, lookups=lookups, branch=self.branch
            )
        if drafted.leaves is not None:
            result = accept_tree(state, drafted, verify_tree(state, self.E, drafted))
        else:
            result = accept_round(state, drafted, verify(state, self.E, drafted))
        return replace(result, most_drafted=d)


def draft_problems(stop: float, stop_entropy: float, ngram: int) -> list[str]:
    """Return what is wrong with the settings of a draft."""
    found = []
    if not stop >= 0.0:
        found.append(f"stop: {stop}, give a probability, or 0 to stop no draft")
    if not stop_entropy >= 0.0:
        found.append(f"stop_entropy: {stop_entropy}, give nats, at least 0")
    if ngram < 0:
        found.append(f"ngram: {ngram}, give a number of tokens, or 0 for none")
    return found


def verify(state: DecodeState, E: int, drafted: Draft) -> Tensor:
    """Return the full model's distributions after the pending token and after each drafted one.

    The last drafted token has not been run yet, nor have n-gram drafts: they go through the first E
    layers, then all d + 1 tokens through layers E, ..., L - 1 in one pass.

    Args:
        state: The batch.
        E: Layers that drafted; 0 where none of their outputs can be used.
        drafted: The draft, with its x_E.

    Returns:
        p: (batch, d + 1, vocab).
    """
    return state.distribution(run_verifier_layers(state, E, drafted, ())[0])


def run_verifier_layers(
    state: DecodeState, E: int, drafted: Draft, tapped: tuple[int, ...]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return x_L of all d + 1 tokens, and {l: x_{l+1}} for l >= E in `tapped`."""
    tokens = torch.cat((state.batch.pending[:, None], drafted.tokens), dim=1)
    done = len(drafted.exits)
    x_E = state.model.embed(tokens[:, done:])
    if E > 0:
        x_E = state.run(x_E, 0, E, offset=done)
    x_E = torch.cat((*drafted.exits, x_E), dim=1)
    return state.run_and_tap(x_E, E, state.model.config.n_layers, exit_layers=tapped)


def accept_round(state: DecodeState, drafted: Draft, p: Tensor) -> Round:
    """Accept drafted tokens by the full model's distributions p: (batch, d + 1, vocab)."""
    accepted, next_token = accept(drafted.tokens, drafted.q, p, state.generator, drafted.lengths)
    tokens = torch.cat((drafted.tokens, next_token[:, None]), dim=1)
    tokens.scatter_(1, accepted[:, None], next_token[:, None])
    lengths = drafted.lengths
    if lengths is None:
        lengths = torch.full_like(accepted, drafted.tokens.shape[1])
    return Round(tokens, accepted, drafted=lengths)
