"""Which strategies `tune` measures, by what was predicted."""

from collections.abc import Sequence
from dataclasses import replace

from inference.engine.strategy import Strategy
from inference.evaluation.costs import Costs, Prediction
from inference.evaluation.measurement import AUTOREGRESSIVE
from inference.strategies.dynamic import Dynamic
from inference.strategies.registry import has_threshold, parse_strategy
from inference.strategies.self_speculative import SelfSpeculative

EXITS = 3
"""Exits that `dynamic` is given to choose among."""


def candidates(
    predictions: Sequence[Prediction], costs: Costs, max_d: int, top: int
) -> list[Strategy]:
    """Return what is to be confirmed: the best pairs, plain and with drafts that cost less.

    `dynamic` chooses among the few exits that promise most: a look costs the head of each.
    """
    arms: list[Strategy] = [AUTOREGRESSIVE]
    for prediction in predictions[:top]:
        E, d = prediction.E, prediction.d
        arms += [SelfSpeculative(E=E, d=d), SelfSpeculative(E=E, d=max_d, stop=0.5)]
        arms += [SelfSpeculative(E=E, d=max_d, stop=0.5, ngram=n) for n in (2, 3)]
    exits = sorted([*dict.fromkeys(prediction.E for prediction in predictions)][:EXITS])
    dynamic = Dynamic(
        d=max_d,
        exits=tuple(exits),
        draft_costs=tuple(_rounded(costs.rounds[E - 1][0]) for E in exits),
        verify_costs=tuple(_rounded(costs.rounds[E - 1][1]) for E in exits),
    )
    arms.append(dynamic)
    arms += [replace(dynamic, lookup_cost=_rounded(costs.guesses), ngram=n) for n in (2, 3)]
    return [*dict.fromkeys(arms)]


def _rounded(cost: float) -> float:
    return max(0.01, round(cost, 2))


def with_thresholds(text: str, thresholds: Sequence[float], n_layers: int) -> list[Strategy]:
    """Return autoregressive decoding and a strategy with each of some thresholds.

    Raises:
        ValueError: the strategy has no threshold, or its settings do not fit the model.
    """
    if not has_threshold(type(parse_strategy(text))):
        raise ValueError(
            f"strategy: {text} has nothing to tune, give self_speculative or one with a threshold"
        )
    arms = [parse_strategy(f"{text}:threshold={t}").with_defaults(n_layers) for t in thresholds]
    if problems := {problem for arm in arms for problem in arm.problems(n_layers)}:
        raise ValueError("; ".join(sorted(problems)))
    return [AUTOREGRESSIVE, *arms]
