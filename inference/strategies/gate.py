"""Early exit where a fitted classifier is sure enough."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from inference.engine.state import Decoder, DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.gate_classifiers import GateClassifier, load_gate
from inference.strategies.jump_maps import load_exit_map
from inference.strategies.row_exits import (
    ExitObservation,
    Rule,
    decode_until_sure,
)

TRAINED_BY = "give a file that python -m inference.train_gate wrote"


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

        return decode_until_sure(state, gate.exits, new_rule, load_exit_map(self.jump, state.model))


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
