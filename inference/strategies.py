"""Strategies by name."""

from dataclasses import dataclass

from inference.autoregressive import Autoregressive
from inference.self_speculative import SelfSpeculative
from inference.state import Strategy

STRATEGIES = ("autoregressive", "early_exit", "self_speculative")
"""The known names."""


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """A strategy and its settings, as a user gives them."""

    name: str
    """One of STRATEGIES."""
    E: int | None = None
    """Layers run before the exit (early_exit, self_speculative); None means a quarter of the
    model's, rounded, at least 1."""
    d: int | None = None
    """Tokens drafted per round (self_speculative); None means 4."""

    def filled(self, n_layers: int) -> "StrategyConfig":
        """Return a copy with E and d set where the strategy uses them, and None elsewhere.

        Raises:
            ValueError: there is no such strategy.
        """
        if self.name not in STRATEGIES:
            raise ValueError(f"strategy: {self.name}, give one of {', '.join(STRATEGIES)}")
        quarter = max(1, round(n_layers / 4))
        return StrategyConfig(
            name=self.name,
            E=None if self.name == "autoregressive" else quarter if self.E is None else self.E,
            d=None if self.name != "self_speculative" else 4 if self.d is None else self.d,
        )

    def build(self, n_layers: int) -> Strategy:
        """Make the strategy for a model of n_layers layers.

        Raises:
            ValueError: there is no such strategy, or E or d does not fit the model.
        """
        settings = self.filled(n_layers)
        strategy: Strategy
        if settings.d is not None and settings.E is not None:
            strategy = SelfSpeculative(E=settings.E, d=settings.d)
        else:
            strategy = Autoregressive(E=settings.E)
        if problems := strategy.problems(n_layers):
            raise ValueError("; ".join(problems))
        return strategy
