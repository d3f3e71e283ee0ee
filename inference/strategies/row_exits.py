"""Tokens that leave at the first exit a rule is sure of, each row of a batch for itself.

A row that has left keeps its hidden state while the others go on, so that the keys and values its
later layers write are those of the state it left with: CALM's state propagation (arXiv 2207.07061,
section 3.1). Rows get the tokens they would get alone. Knows no rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.decoder import Decoder
from inference.engine.sampling import sample
from inference.engine.state import DecodeState


@dataclass(frozen=True)
class ExitObservation:
    """What a rule may look at when a token is at an exit."""

    E: int
    """Layers run."""
    h: Tensor
    """(batch, dim), x_E."""
    before: Tensor
    """(batch, dim), x at the exit looked at before; x_0 at the first."""
    logits: Callable[[], Tensor]
    """Returns the exit's logits, (batch, vocab); the head is run only if this is called."""
    new_tokens: Tensor
    """(batch,) int64, tokens the row has been given before this one."""


Rule = Callable[[ExitObservation], Tensor]
"""Says which rows leave: (batch,) bool. It looks at the logits of every exit or of none."""


class ExitMap(Protocol):
    """What stands between an exit and the head."""

    def __call__(self, E: int, h: Tensor) -> Tensor:
        """Return what the head is to read for h = x_E: (..., dim), same shape."""
        ...


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


def decode_until_sure(
    state: DecodeState,
    exits: range,
    new_rule: Callable[[], Rule],
    exit_map: ExitMap | None = None,
) -> Decoder:
    """Return a decoder of one token a round, each row leaving at the first exit its rule says.

    Args:
        state: The batch.
        exits: The E at which rows may leave, ascending.
        new_rule: Called once a round; what it returns is asked at each exit in turn.
        exit_map: Applied to what the head reads at these exits, never to what goes on.
    """
    return partial(_decode_one, state, exits, new_rule, exit_map)


def _decode_one(
    state: DecodeState,
    exits: range,
    new_rule: Callable[[], Rule],
    exit_map: ExitMap | None,
    max_tokens: int,
) -> Round:
    n_layers, rule = state.model.config.n_layers, new_rule()
    h = state.embed_pending()
    left, layer, before = state.batch.finished, 0, h
    depths = torch.full_like(state.batch.positions, n_layers)
    read, logits = h, None
    """What the head reads of the rows that have left, and says, if it was put on every exit."""
    for E in exits:
        h, layer = _run(state, h, layer, E, left), E
        probe = _Probe(state, h, E) if exit_map is None else _Probe(state, exit_map(E, h), None)
        new_tokens = state.batch.positions + 1 - state.batch.prompt_lengths
        leaves = rule(ExitObservation(E, h[:, 0], before[:, 0], probe, new_tokens)) & ~left
        before = h
        read = torch.where(leaves[:, None, None], probe.read, read)
        if probe.logits is not None:
            said = probe.logits
            logits = said if logits is None else torch.where(leaves[:, None], said, logits)
        depths = torch.where(leaves, E, depths)
        left = left | leaves
        if state.sync_bool(left.all()):
            state.write_keys_and_values(h, E, n_layers)
            break
    else:
        h = _run(state, h, layer, n_layers, left)
        read = torch.where(left[:, None, None], read, h)
        if logits is not None:
            logits = torch.where(left[:, None], logits, state.logits(read)[:, 0])
    if logits is None:
        logits = _read_each(state, read, depths, exits if exit_map is None else range(0))
    tokens = sample(state.filtered(logits[:, None]), state.generator)
    return Round.plain(tokens, depths)


def _read_each(state: DecodeState, read: Tensor, depths: Tensor, exits: range) -> Tensor:
    """Return the logits, (batch, vocab), of rows that read at exits of different parts.

    Args:
        state: The batch.
        read: (batch, 1, dim), what each row left with.
        depths: (batch,) int64, E, the layers behind it.
        exits: Those E that are read as they are, and not as x_L.
    """
    x = state.before_head(read)
    for E in state.model.config.own_exits:
        if E in exits:
            x = torch.where((depths == E)[:, None, None], state.before_head(read, E), x)
    return state.head(x)[:, 0]


class _Probe:
    """The head at one exit, run when it is first called."""

    def __init__(self, state: DecodeState, read: Tensor, E: int | None) -> None:
        self._state, self.read, self._E = state, read, E
        self.logits: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.logits is None:
            self.logits = self._state.logits(self.read, self._E)[:, 0]
        return self.logits


def _run(state: DecodeState, h: Tensor, start: int, stop: int, left: Tensor) -> Tensor:
    """Run layers for the rows that have not left; the others write keys of the state they keep."""
    if len(left) == 1 or start == 0:
        # A row alone runs only while it has not left; before the first exit none has but finished
        # ones, whose keys nothing reads.
        return state.run(h, start, stop)
    for l in range(start, stop):
        h = torch.where(left[:, None, None], h, state.run(h, l, l + 1))
    return h
