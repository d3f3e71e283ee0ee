"""PABEE (arXiv 2006.04152): a token exits when enough exits in a row agree on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.jump_maps import load_exit_map
from inference.strategies.row_exits import (
    ExitObservation,
    decode_until_sure,
    exit_problems,
    exits_from,
)


@dataclass(frozen=True, kw_only=True)
class Patience(Strategy):
    """Exit when so many exits in a row, after the first, predict the same token.

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
        found = exit_problems(self.first, self.interval, n_layers)
        return found + self.below(1, patience="exit")

    def start(self, state: DecodeState) -> Decoder:
        exits = exits_from(self.first, self.interval, state.model.config.n_layers)
        exit_map = load_exit_map(self.jump, state.model)
        return decode_until_sure(state, exits, lambda: _PatienceRule(self.patience), exit_map)


class _PatienceRule:
    """Counts, for one token of each row, the exits in a row that predict the same."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._predicted: Tensor | None = None
        self._times = torch.zeros(())

    def __call__(self, exit_: ExitObservation) -> Tensor:
        predicted, before = exit_.logits().argmax(-1), self._predicted
        same = torch.zeros_like(predicted) if before is None else (predicted == before).long()
        self._times = (self._times + 1) * same
        self._predicted = predicted
        return self._times >= self._patience
