"""When a token is sure enough to leave: CALM, PABEE and fitted gates.

`row_exits` runs the layers; a rule here looks at one exit and says which rows leave.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference.engine.state import Decoder, DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.gate_classifiers import GateClassifier, load_gate
from inference.strategies.jump import load_jump
from inference.strategies.row_exits import (
    ExitMap,
    ExitObservation,
    Rule,
    decode_until_sure,
    exit_problems,
    exits_from,
)

TRAINED_BY = "give a file that python -m inference.train_gate wrote"


@dataclass(frozen=True, kw_only=True)
class Calm(Strategy):
    """Leave at the first exit whose confidence reaches a threshold.

    CALM (arXiv 2207.07061), equation 5 for the threshold of the t-th new token:
      lambda'(t) = clip(0.9 lambda + 0.1 exp(-tau t / N), 0, 1)
    """

    name: ClassVar[str] = "calm"
    confidence: Literal["gap", "similarity", "gate"] = "gap"
    """gap: the two largest probabilities of the exit, one less the other. similarity: the cosine
    of its hidden state and that of the exit before. gate: what a fitted classifier says. The last
    two need no head at an exit."""
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
    gate: Path | None = None
    """The classifier: a file that inference.train_gate wrote."""
    jump: Path | None = None
    """A linear map before the head of every exit: a file that inference.fit_jump wrote."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = exit_problems(self.first, self.interval, n_layers)
        if not self.threshold >= 0.0:
            found.append(f"threshold: {self.threshold}, give at least 0")
        if self.tau is not None and not self.tau >= 0.0:
            found.append(f"tau: {self.tau}, give at least 0")
        if self.length < 1:
            found.append(f"length: {self.length}, give at least 1 token")
        elif not self.tau:
            found += self.unused_settings("length", without="tau above 0")
        if (self.confidence == "gate") != (self.gate is not None):
            remedy = TRAINED_BY if self.gate is None else "it needs confidence=gate"
            found.append(f"gate: {self.gate or 'none'}, {remedy}")
        return found

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        exits = exits_from(self.first, self.interval, state.model.config.n_layers)
        exit_map = _exit_map(self.jump, state)
        if self.gate is None:
            return decode_until_sure(state, exits, lambda: self.leaves, exit_map)
        gate = load_gate(self.gate, state.model)
        sees_first = exits.start == gate.exits.start or gate.form != "multinomial"
        if not sees_first or not set(exits) <= set(gate.exits):
            raise ValueError(
                f"gate: {self.gate} was fitted for first={gate.exits.start}"
                f":interval={gate.exits.step}, give these to calm or fit another"
            )
        return decode_until_sure(state, exits, lambda: _Gating(gate, self.threshold_at), exit_map)

    def leaves(self, seen: ExitObservation) -> Tensor:
        """Say which rows leave, by what needs no file."""
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
class Patience(Strategy):
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
    jump: Path | None = None
    """A linear map before the head of every exit: a file that inference.fit_jump wrote."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = exit_problems(self.first, self.interval, n_layers)
        if self.patience < 1:
            found.append(f"patience: {self.patience}, give at least 1 exit")
        return found

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        exits = exits_from(self.first, self.interval, state.model.config.n_layers)
        exit_map = _exit_map(self.jump, state)
        return decode_until_sure(state, exits, lambda: _Patient(self.patience), exit_map)


class _Patient:
    """Counts, for one token of each row, the exits in a row that said the same."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._said: Tensor | None = None
        self._times = torch.zeros(())

    def __call__(self, seen: ExitObservation) -> Tensor:
        said = seen.logits().argmax(-1)
        same = torch.zeros_like(said) if self._said is None else (said == self._said).long()
        self._times = (self._times + 1) * same
        self._said = said
        return self._times >= self._patience


@dataclass(frozen=True, kw_only=True)
class Gate(Strategy):
    """Leave at the first exit where a fitted classifier is sure enough.

    BERxiT (2021.eacl-main.8), CALM's classifier, the Depth-Adaptive Transformer (arXiv 1910.10073):
    see `gates.Form`. The file says at which exits it is asked.
    """

    name: ClassVar[str] = "gate"
    path: Path | None = None
    """The classifier: a file that inference.train_gate wrote."""
    threshold: float = 0.5
    """Score in [0, 1] at which a token leaves; above 1 none does."""
    jump: Path | None = None
    """A linear map before the head of every exit: a file that inference.fit_jump wrote."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = [] if self.path is not None else [f"path: none, {TRAINED_BY}"]
        if not self.threshold >= 0.0:
            found.append(f"threshold: {self.threshold}, give at least 0")
        return found

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        assert self.path is not None
        gate = load_gate(self.path, state.model)

        def new_rule() -> Rule:
            return _Gating(gate, lambda t: torch.full(t.shape, self.threshold, device=t.device))

        return decode_until_sure(state, gate.exits, new_rule, _exit_map(self.jump, state))


class _Gating:
    """Asks a classifier about one token of each row, and keeps its state at the first exit."""

    def __init__(self, gate: GateClassifier, threshold_at: Callable[[Tensor], Tensor]) -> None:
        self._gate, self._threshold_at = gate, threshold_at
        self._h_first: Tensor | None = None

    def __call__(self, seen: ExitObservation) -> Tensor:
        if self._h_first is None:
            self._h_first = seen.h
        score = self._gate.score(seen.E, seen.h, self._h_first)
        return score >= self._threshold_at(seen.new_tokens)


def _exit_map(path: Path | None, state: DecodeState) -> ExitMap | None:
    return None if path is None else load_jump(path, state.model)
