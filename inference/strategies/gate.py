"""Gates: a token exits at the first exit where a fitted classifier's score reaches a threshold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.gate_classifiers import GateClassifier, load_gate
from inference.strategies.jump_maps import load_exit_map
from inference.strategies.row_exits import ExitObservation, decode_until_sure

TRAINED_BY = "give a file that python -m inference.train_gate wrote"


@dataclass(frozen=True, kw_only=True)
class Gate(Strategy):
    """Exit at the first exit where a fitted classifier's score reaches a threshold.

    BERxiT (2021.eacl-main.8), CALM's classifier, the Depth-Adaptive Transformer (arXiv 1910.10073):
    see `gate_classifiers.Form`. The exits are those the classifier was fitted for.
    """

    name: ClassVar[str] = "gate"
    path: Path | None = None
    """The classifier: a file that inference.train_gate wrote."""
    threshold: float = 0.5
    """Score in [0, 1] at which a token exits; above 1 none exits early."""
    jump: Path | None = None
    """A linear map before the head of every exit: a file that inference.fit_jump wrote."""

    def problems(self, n_layers: int) -> list[str]:
        found = [] if self.path is not None else [f"path: none, {TRAINED_BY}"]
        return found + self.below(0, threshold="")

    def start(self, state: DecodeState) -> Decoder:
        assert self.path is not None
        return decode_gated(state, self.path, lambda new_tokens: self.threshold, jump=self.jump)


def decode_gated(
    state: DecodeState,
    path: Path,
    threshold_at: Callable[[Tensor], Tensor | float],
    *,
    exits: range | None = None,
    jump: Path | None,
) -> Decoder:
    """Return a decoder whose rows exit where a classifier's score first reaches a threshold.

    Args:
        state: The batch.
        path: File of the classifier.
        threshold_at: Returns the threshold for the number of new tokens of each row so far,
            (batch,) int64.
        exits: The E at which rows may exit; those the classifier was fitted for if None.
        jump: File of the linear maps before the head, if any.

    Raises:
        ValueError: A file is missing or belongs to other weights, or the classifier was not fitted
            for these exits.
    """
    gate, exit_map = load_gate(path, state.model), load_exit_map(jump, state.model)
    if exits is None:
        exits = gate.exits
    has_first = exits.start == gate.exits.start or gate.form != "multinomial"
    if not has_first or not set(exits) <= set(gate.exits):
        raise ValueError(
            f"gate: {path} was fitted for first={gate.exits.start}:interval={gate.exits.step}, "
            "give these or train another"
        )
    return decode_until_sure(state, exits, lambda: _GateRule(gate, threshold_at), exit_map)


class _GateRule:
    """Scores one token of each row at each exit, and keeps its state at the first."""

    def __init__(
        self, gate: GateClassifier, threshold_at: Callable[[Tensor], Tensor | float]
    ) -> None:
        self._gate, self._threshold_at = gate, threshold_at
        self._h_first: Tensor | None = None

    def __call__(self, exit_: ExitObservation) -> Tensor:
        if self._h_first is None:
            self._h_first = exit_.h
        score = self._gate.score(exit_.E, exit_.h, self._h_first)
        return score >= self._threshold_at(exit_.new_tokens)
