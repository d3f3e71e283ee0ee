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
    """(batch, dim), x one interval of exits earlier: at the previous exit; at the first, x_0 if it
    comes before a whole interval."""
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
    h = before = read = state.embed_pending()
    """`read` is the head's input of each row."""
    logits: Tensor | None = None
    """Of each row, if the rule takes them at every exit."""
    left_at: list[int] = []
    exited, layer = batch.finished, 0
    depths = torch.full_like(batch.positions, n_layers)
    for E in exits:
        if layer == 0:
            h, before = _run_to_first(state, h, exits)
        else:
            before, h = h, _run(state, h, layer, E, exited)
        layer, head = E, _Head(state, h, E, exit_map)
        observation = ExitObservation(E, h[:, 0], before[:, 0], head, batch.new_tokens)
        exiting = rule(observation) & ~exited
        depths = torch.where(exiting, E, depths)
        exited = exited | exiting
        if head.logits is not None:
            here = head.logits
            logits = here if logits is None else torch.where(exiting[:, None], here, logits)
        some, all_rows = state.sync_list(torch.stack((exiting.any(), exited.all())))
        if some and logits is None:
            read = torch.where(exiting[:, None, None], head.read(), read)
            left_at.append(E)
        if all_rows:
            state.write_keys_and_values(h, E, n_layers)
            break
    else:
        h = _run(state, h, layer, n_layers, exited)
        read = torch.where(exited[:, None, None], read, h)
        if logits is not None:
            logits = torch.where(exited[:, None], logits, state.logits(read)[:, 0])
    if logits is None:
        logits = _logits_by_depth(state, read, depths, left_at if exit_map is None else [])
    return Round.plain(sample(state.filtered(logits[:, None]), state.generator), depths)


def _logits_by_depth(state: DecodeState, read: Tensor, depths: Tensor, exits: list[int]) -> Tensor:
    """Return the logits, (batch, vocab), of rows whose exits may have parts of their own.

    Args:
        state: The batch.
        read: (batch, 1, dim), the head's input of each row.
        depths: (batch,) int64, E, the layers behind it.
        exits: The E at which rows left and whose states are read as they are, and not as x_L.
    """
    x = state.before_head(read)
    for E in exits:
        if E in state.model.config.own_exits:
            x = torch.where((depths == E)[:, None, None], state.before_head(read, E), x)
    return state.head(x)[:, 0]


def _run_to_first(state: DecodeState, h: Tensor, exits: range) -> tuple[Tensor, Tensor]:
    """Return x at the first exit, and one interval before it, or x_0: (batch, 1, dim) each."""
    before = exits.start - exits.step
    if before <= 0:
        return state.run(h, 0, exits.start), h
    h, tapped = state.run_and_tap(h, 0, exits.start, exit_layers=(before - 1,))
    return h, tapped[before - 1]


class _Head:
    """The head at one exit, run when it is first called."""

    def __init__(self, state: DecodeState, h: Tensor, E: int, exit_map: ExitMap | None) -> None:
        self._state, self._h, self._E, self._exit_map = state, h, E, exit_map
        self.logits: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the logits, (batch, vocab)."""
        if self.logits is None:
            E = self._E if self._exit_map is None else None  # a mapped state stands for x_L
            self.logits = self._state.logits(self.read(), E)[:, 0]
        return self.logits

    def read(self) -> Tensor:
        """Return what the head reads, (batch, 1, dim)."""
        return self._h if self._exit_map is None else self._exit_map(self._E, self._h)


def _run(state: DecodeState, h: Tensor, start: int, stop: int, exited: Tensor) -> Tensor:
    """Run layers for rows that have not exited; the others write keys of the state they keep."""
    if len(exited) == 1 or start == 0:
        # A row alone runs only while it has not exited; before the first exit only finished rows
        # count as exited, and nothing reads their keys.
        return state.run(h, start, stop)
    for l in range(start, stop):
        h = torch.where(exited[:, None, None], h, state.run(h, l, l + 1))
    return h
