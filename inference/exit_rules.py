"""Tokens that leave when an exit is sure: CALM and PABEE.

A row that has left keeps its hidden state while the others go on, so that the keys and values its
later layers write are those of the state it left with: CALM's state propagation (arXiv 2207.07061,
section 3.1). Rows of a batch leave each for itself, and get the tokens they would get alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference.sampling import sample
from inference.state import Decoder, DecodeState, Round
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True)
class Seen:
    """What a rule may look at when a token is at an exit."""

    h: Tensor
    """(batch, dim), x_E."""
    before: Tensor
    """(batch, dim), x at the exit looked at before; x_0 at the first."""
    logits: Callable[[], Tensor]
    """Returns the exit's logits, (batch, vocab); the head is run only if this is called."""
    new_tokens: Tensor
    """(batch,) int64, tokens the row has been given before this one."""


Rule = Callable[[Seen], Tensor]
"""Says which rows leave: (batch,) bool."""


def exits_from(first: int, interval: int, n_layers: int) -> range:
    """Return the E at which a rule is asked; at the last layer every token leaves anyway."""
    return range(first, n_layers, interval)


def exit_problems(first: int, interval: int, n_layers: int) -> list[str]:
    """Return what is wrong with where a rule is asked."""
    found = []
    if not 1 <= first <= n_layers:
        found.append(f"first: {first}, give 1 to {n_layers} layers for this model")
    if interval < 1:
        found.append(f"interval: {interval}, give at least 1 layer")
    return found


def decode_until_sure(state: DecodeState, exits: range, new_rule: Callable[[], Rule]) -> Decoder:
    """Return a decoder of one token a round, each row leaving at the first exit its rule says.

    Args:
        state: The batch.
        exits: The E at which rows may leave, ascending.
        new_rule: Called once a round; what it returns is asked at each exit in turn.
    """
    return partial(_decode_one, state, exits, new_rule)


def _decode_one(state: DecodeState, exits: range, new_rule: Callable[[], Rule], room: int) -> Round:
    n_layers, rule = state.model.config.n_layers, new_rule()
    h = state.model.embed(state.pending[:, None])
    left, layer, before = state.finished, 0, h
    depths = torch.full_like(state.positions, n_layers)
    logits = torch.zeros(len(h), state.model.config.vocab_size, dtype=h.dtype, device=h.device)
    for E in exits:
        h = _run(state, h, layer, E, left)
        layer = E
        head: list[Tensor] = []

        def look(h: Tensor = h, head: list[Tensor] = head) -> Tensor:
            head.append(state.logits(h)[:, 0])
            return head[-1]

        new_tokens = state.positions + 1 - state.prompt_lengths
        leaves = rule(Seen(h[:, 0], before[:, 0], look, new_tokens)) & ~left
        before = h
        if not head and state.ask(leaves.any()):
            look()
        if head:
            logits = torch.where(leaves[:, None], head[-1], logits)
        depths = torch.where(leaves, E, depths)
        left = left | leaves
        if state.ask(left.all()):
            state.write_keys_and_values(h, E, n_layers)
            break
    else:
        h = _run(state, h, layer, n_layers, left)
        logits = torch.where(left[:, None], logits, state.logits(h)[:, 0])
    tokens = sample(state.filtered(logits[:, None]), state.generator)
    none = torch.zeros_like(state.positions)
    return Round(tokens, accepted=none, drafted=none, depths=depths[:, None])


def _run(state: DecodeState, h: Tensor, start: int, stop: int, left: Tensor) -> Tensor:
    """Run layers for the rows that have not left; the others write keys of the state they keep."""
    if len(left) == 1:  # a row alone runs only while it has not left
        return state.run(h, start, stop)
    for l in range(start, stop):
        h = torch.where(left[:, None, None], h, state.run(h, l, l + 1))
    return h


@dataclass(frozen=True, kw_only=True)
class Calm:
    """Leave at the first exit whose confidence reaches a threshold.

    CALM (arXiv 2207.07061), equation 5 for the threshold of the t-th new token:
      lambda'(t) = clip(0.9 lambda + 0.1 exp(-tau t / N), 0, 1)
    """

    name: ClassVar[str] = "calm"
    confidence: Literal["gap", "similarity"] = "gap"
    """gap: the two largest probabilities of the exit, one less the other. similarity: the cosine
    of its hidden state and that of the exit before, which needs no head."""
    threshold: float = 0.9
    """lambda; above 1 no token leaves early."""
    tau: float | None = None
    """How fast the threshold falls from its first value (the authors take 4); constant if not
    given."""
    length: int = 128
    """N, new tokens over which it falls."""
    first: int = 1
    """Layers before the first exit."""
    interval: int = 1
    """Layers from one exit to the next."""

    def filled(self, n_layers: int) -> "Calm":
        """Return itself: nothing is open."""
        return self

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = exit_problems(self.first, self.interval, n_layers)
        if not self.threshold >= 0.0:
            found.append(f"threshold: {self.threshold}, give at least 0")
        if self.tau is not None and not self.tau >= 0.0:
            found.append(f"tau: {self.tau}, give at least 0")
        if self.length < 1:
            found.append(f"length: {self.length}, give at least 1 token")
        return found

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return all layers."""
        return n_layers, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        exits = exits_from(self.first, self.interval, state.model.config.n_layers)
        return decode_until_sure(state, exits, lambda: self.leaves)

    def leaves(self, seen: Seen) -> Tensor:
        """Say which rows leave."""
        if self.confidence == "gap":
            confidence = softmax_gap(seen.logits())
        else:
            confidence = torch.cosine_similarity(seen.h.float(), seen.before.float(), dim=-1)
        return confidence >= self.threshold_at(seen.new_tokens)

    def threshold_at(self, t: Tensor) -> Tensor:
        """Return lambda'(t), for t: (batch,) int64."""
        if self.tau is None:
            return torch.full(t.shape, self.threshold, device=t.device)
        fall = 0.1 * torch.exp(-self.tau * t / self.length)
        return (0.9 * self.threshold + fall).clamp(0.0, 1.0)


def softmax_gap(logits: Tensor) -> Tensor:
    """Return p_1 - p_2 of the two most probable tokens, (...), for logits: (..., vocab)."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Leave when so many exits in a row, after the first, say the same token.

    PABEE (arXiv 2006.04152), with the LM head in place of its classifiers.
    """

    name: ClassVar[str] = "patience"
    patience: int = 3
    """Times the most probable token must stay the same from exit to exit."""
    first: int = 1
    """Layers before the first exit."""
    interval: int = 1
    """Layers from one exit to the next."""

    def filled(self, n_layers: int) -> "Patience":
        """Return itself: nothing is open."""
        return self

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = exit_problems(self.first, self.interval, n_layers)
        if self.patience < 1:
            found.append(f"patience: {self.patience}, give at least 1 exit")
        return found

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return all layers."""
        return n_layers, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        exits = exits_from(self.first, self.interval, state.model.config.n_layers)
        return decode_until_sure(state, exits, lambda: _Patient(self.patience))


class _Patient:
    """Counts, for one token of each row, the exits in a row that said the same."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._said: Tensor | None = None
        self._times = torch.zeros(())

    def __call__(self, seen: Seen) -> Tensor:
        said = seen.logits().argmax(-1)
        same = torch.zeros_like(said) if self._said is None else (said == self._said).long()
        self._times = (self._times + 1) * same
        self._said = said
        return self._times >= self._patience
