"""The interface of a decoding strategy: its settings, their checks, and its decoder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from inference.engine.counters import Counters
from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """A decoding strategy: a frozen dataclass of its settings.

    To add one, write a subclass in a file of its name and list it in `strategies/registry.py`.
    """

    name: ClassVar[str]
    measured: ClassVar[tuple[str, ...]] = ()
    """Settings that hold what a command has measured, for machines more than for readers."""

    @property
    def lossless(self) -> bool:
        """Whether tokens have the full model's distribution, and greedy ones are its own."""
        return False

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with the settings left open filled in for a model of n_layers layers."""
        return self

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings, filled in, one line each."""
        return []

    def validated(self, n_layers: int) -> Self:
        """Return a copy filled in for a model of n_layers layers.

        Raises:
            ValueError: The settings do not fit.
        """
        filled = self.with_defaults(n_layers)
        if problems := filled.problems(n_layers):
            raise ValueError("; ".join(problems))
        return filled

    def prefill_layers(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return the number of layers that prompts are run through, and the parts skipped."""
        return n_layers, NOTHING

    def spare_slots(self, slots: int) -> int:
        """Return how many KV slots a round may write beyond the `slots` of a row's tokens."""
        return 0

    @abstractmethod
    def start(self, state: DecodeState) -> Decoder:
        """Return a decoder for a batch.

        Raises:
            ValueError: A file or model that the settings name is missing or does not fit.
        """

    def remark(self, counters: Counters) -> str:
        """Return a line on a run that its counts alone do not explain; "" if there is none."""
        return ""

    def below(self, least: int, **units: str) -> list[str]:
        """Return a problem for each of the settings that is less than `least`.

        Args:
            least: The least value allowed.
            units: Names of the settings, and the unit of each, or "" for none.
        """
        return [
            f"{name}: {getattr(self, name)}, give at least {least} {unit}".rstrip()
            for name, unit in units.items()
            if not getattr(self, name) >= least
        ]

    def unused_settings(self, *names: str, without: str) -> list[str]:
        """Return a problem for each of the settings that is not at its default.

        Args:
            names: Settings that have no effect, as the others are.
            without: The setting that would give them one.
        """
        return [
            f"{name}: {getattr(self, name)}, has no effect without {without}"
            for name in names
            if getattr(self, name) != getattr(type(self), name)
        ]


def exit_list_problems(name: str, exits: Sequence[int], n_layers: int) -> list[str]:
    """Return what is wrong with `exits`, each an E, of the strategy of this name."""
    if n_layers == 1:
        return (
            ["exits: this model has 1 layer and no exit before it, leave exits out"]
            if exits
            else []
        )
    if exits and list(exits) == sorted({E for E in exits if 1 <= E < n_layers}):
        return []
    return [
        f"exits: {'+'.join(map(str, exits)) or 'none'}, {name} needs ascending layers from 1 to "
        f"{n_layers - 1} for this model"
    ]
