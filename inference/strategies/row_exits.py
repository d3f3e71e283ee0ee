"""Early exit of each row at the first exit its rule accepts.

A row that has exited keeps its hidden state while the others go on, so that the keys and values its
later layers write are those of the state it exited with: CALM's state propagation (arXiv
2207.07061, section 3.1). Rows get the tokens they would get alone. Imports no rule.
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
    """The inputs of a rule, for one token of each row at one exit."""

    E: int
    """Layers run."""
    h: Tensor
    """(batch, dim), x_E."""
    before: Tensor
    """(batch, dim), x at the previous exit; x_0 at the first."""
    logits: Callable[[], Tensor]
    """Returns the exit's logits, (batch, vocab); the head runs only if this is called."""
    new_tokens: Tensor
    """(batch,) int64, tokens the row has been given before this one."""


Rule = Callable[[ExitObservation], Tensor]
"""Returns the rows that exit: (batch,) bool. It takes the logits of every exit or of none."""


class ExitMap(Protocol):
    """A map between an exit and the head."""

    def __call__(self, E: int, h: Tensor) -> Tensor:
        """Return the head's input for h = x_E: (..., dim), same shape."""
        ...


def exits_from(first: int, interval: int, n_layers: int) -> range:
    """Return the E of the exits; the last layer is none, as every token exits there anyway."""
    return range(first, n_layers, interval)


def exit_problems(first: int, interval: int, n_layers: int) -> list[str]:
    """Return what is wrong with the first exit and the interval between exits, in layers."""
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
    """Return a decoder of one token a round, each row exiting where its rule first accepts.

    Args:
        state: The batch.
        exits: The E at which rows may exit, ascending.
        new_rule: Called once a round for a rule, which is applied at each exit in turn.
        exit_map: Applied to the head's input at these exits, never to what later layers read.
    """
    return partial(_decode_one, state, exits, new_rule, exit_map)


def _decode_one(
    state: DecodeState,
    exits: range,
    new_rule: Callable[[], Rule],
    exit_map: ExitMap | None,
    max_tokens: int,
) -> Round:
    n_layers, rule, batch = state.model.config.n_layers, new_rule(), state.batch
    h = state.embed_pending()
    exited, layer, before = batch.finished, 0, h
    depths = torch.full_like(batch.positions, n_layers)
    read, logits = h, None
    """The head's input of each row, and its logits if the rule takes them at every exit."""
    for E in exits:
        h, layer = _run(state, h, layer, E, exited), E
        head = _Head(state, h, E) if exit_map is None else _Head(state, exit_map(E, h), None)
        observation = ExitObservation(E, h[:, 0], before[:, 0], head, batch.new_tokens)
        exiting = rule(observation) & ~exited
        before = h
        read = torch.where(exiting[:, None, None], head.read, read)
        if head.logits is not None:
            here = head.logits
            logits = here if logits is None else torch.where(exiting[:, None], here, logits)
        depths = torch.where(exiting, E, depths)
        exited = exited | exiting
        if state.sync_bool(exited.all()):
            state.write_keys_and_values(h, E, n_layers)
            break
    else:
        h = _run(state, h, layer, n_layers, exited)
        read = torch.where(exited[:, None, None], read, h)
        if logits is not None:
            logits = torch.where(exited[:, None], logits, state.logits(read)[:, 0])
    if logits is None:
        logits = _logits_by_depth(state, read, depths, exits if exit_map is None else range(0))
    return Round.plain(sample(state.filtered(logits[:, None]), state.generator), depths)


def _logits_by_depth(state: DecodeState, read: Tensor, depths: Tensor, exits: range) -> Tensor:
    """Return the logits, (batch, vocab), of rows whose exits may have parts of their own.

    Args:
        state: The batch.
        read: (batch, 1, dim), the head's input of each row.
        depths: (batch,) int64, E, the layers behind it.
        exits: Those E whose states are read as they are, and not as x_L.
    """
    x = state.before_head(read)
    for E in state.model.config.own_exits:
        if E in exits:
            x = torch.where((depths == E)[:, None, None], state.before_head(read, E), x)
    return state.head(x)[:, 0]


class _Head:
    """The head at one exit, run when it is first called."""

    def __init__(self, state: DecodeState, read: Tensor, E: int | None) -> None:
        self._state, self.read, self._E = state, read, E
        self.logits: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.logits is None:
            self.logits = self._state.logits(self.read, self._E)[:, 0]
        return self.logits


def _run(state: DecodeState, h: Tensor, start: int, stop: int, exited: Tensor) -> Tensor:
    """Run layers for rows that have not exited; the others write keys of the state they keep."""
    if len(exited) == 1 or start == 0:
        # A row alone runs only while it has not exited; before the first exit only finished rows
        # count as exited, and nothing reads their keys.
        return state.run(h, start, stop)
    for l in range(start, stop):
        h = torch.where(exited[:, None, None], h, state.run(h, l, l + 1))
    return h
