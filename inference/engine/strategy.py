"""What a way to decode is: its settings, what they need of a model, and how it begins."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """A way to continue rows: a frozen dataclass of its settings."""

    name: ClassVar[str]

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with every setting that was left open set for such a model."""
        return self

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with its settings, filled in, for such a model, one line each."""
        return []

    def validated(self, n_layers: int) -> Self:
        """Return it filled in for such a model.

        Raises:
            ValueError: its settings do not fit.
        """
        filled = self.with_defaults(n_layers)
        if problems := filled.problems(n_layers):
            raise ValueError("; ".join(problems))
        return filled

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the layers prompts are run through: the first so many, less those skipped."""
        return n_layers, NOTHING

    @abstractmethod
    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode.

        Raises:
            ValueError: what it needs besides the model is missing or does not fit.
        """

    def unused_settings(self, *names: str, without: str) -> list[str]:
        """Return a problem for each of these settings, if it is not at its default.

        Args:
            names: Settings that have no effect as the others are.
            without: What it would take, as one writes it.
        """
        return [
            f"{name}: {getattr(self, name)}, has no effect without {without}"
            for name in names
            if getattr(self, name) != getattr(type(self), name)
        ]


def exits_problems(name: str, exits: Sequence[int], n_layers: int) -> list[str]:
    """Return what is wrong with the `exits`, each an E, of the strategy called `name`."""
    if exits and list(exits) == sorted({E for E in exits if 1 <= E < n_layers}):
        return []
    return [
        f"exits: {'+'.join(map(str, exits)) or 'none'}, {name} needs ascending layers from 1 to "
        f"{n_layers - 1} for this model"
    ]
