"""The strategies that `benchmark` and `tune` measure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from inference.engine.strategy import Strategy
from inference.evaluation.costs import Costs
from inference.evaluation.measurement import AUTOREGRESSIVE
from inference.evaluation.prediction import Prediction
from inference.loading.run import Run
from inference.strategies.dynamic import Dynamic
from inference.strategies.registry import has_threshold, parse_strategy
from inference.strategies.self_speculative import SelfSpeculative

EXITS = 3
"""Exits that `dynamic` chooses among."""


def expand_arms(
    strategies: Sequence[str],
    exits: Sequence[int | None],
    draft_tokens: Sequence[int | None],
    n_layers: int,
) -> list[Strategy]:
    """Return every combination that differs, autoregressive decoding first.

    Raises:
        ValueError: A name is unknown, or E or d does not fit the model.
    """
    arms = [
        parse_strategy(name, E=_text(E), d=_text(d)).with_defaults(n_layers)
        for name, E, d in product(strategies, exits, draft_tokens)
    ]
    return _that_fit([AUTOREGRESSIVE, *arms], n_layers)


def _text(setting: int | None) -> str | None:
    return None if setting is None else str(setting)


def check_draft_fits(name: str, d: int, run: Run) -> None:
    """Refuse drafts of d tokens, the value of option `name`, where they cannot be timed.

    Raises:
        ValueError: The context has no room for a token, d drafted ones and the one after.
    """
    context = run.model.config.max_seq_len
    if d + 2 > context:
        raise ValueError(
            f"{name}: {d} drafted tokens do not fit the model's context of {context}, give at "
            f"most {context - 2}"
        )


def _that_fit(arms: Sequence[Strategy], n_layers: int) -> list[Strategy]:
    """Return the arms that differ; refuse all settings that do not fit the model at once."""
    if problems := dict.fromkeys(problem for arm in arms for problem in arm.problems(n_layers)):
        raise ValueError("; ".join(problems))
    return [*dict.fromkeys(arms)]


def candidates(
    predictions: Sequence[Prediction],
    costs: Costs,
    max_d: int,
    *,
    top: int,
    ngrams: Sequence[int] = (2, 3),
) -> list[Strategy]:
    """Return the strategies to confirm: the best shapes, plain and with drafts that cost less.

    Where all of these have leaves, the best without is confirmed too. `dynamic` chooses among the
    few exits of the best predictions: a probe costs the head of each.

    Args:
        predictions: The best first.
        costs: What `dynamic` expects of its exits.
        max_d: Most tokens drafted in a round.
        top: Predictions to confirm.
        ngrams: Lengths of the n-grams to look up.
    """
    arms: list[Strategy] = [AUTOREGRESSIVE]
    for prediction in predictions[:top]:
        shape = SelfSpeculative(E=prediction.E, d=prediction.d, branch=prediction.branch)
        stopping = replace(shape, d=max_d, stop=0.5)
        arms += [shape, stopping, *(replace(stopping, ngram=n) for n in ngrams)]
    if all(prediction.branch > 1 for prediction in predictions[:top]):
        plain = next(prediction for prediction in predictions if prediction.branch == 1)
        arms.append(SelfSpeculative(E=plain.E, d=plain.d))
    exits = sorted([*dict.fromkeys(prediction.E for prediction in predictions)][:EXITS])
    best = {E: next(p for p in predictions if p.E == E) for E in exits}
    branch = max(prediction.branch for prediction in best.values())
    dynamic = Dynamic(
        d=max_d,
        branch=branch,
        leaf_costs=tuple(_rounded(cost, 3) for cost in costs.leaves) if branch > 1 else None,
        exits=tuple(exits),
        draft_costs=tuple(_rounded(costs.rounds[E - 1][0]) for E in exits),
        verify_costs=tuple(_rounded(costs.rounds[E - 1][1]) for E in exits),
    )
    arms.append(dynamic)
    arms += [replace(dynamic, lookup_cost=_rounded(costs.lookup), ngram=n) for n in ngrams]
    return [*dict.fromkeys(arms)]


def _rounded(cost: float, digits: int = 2) -> float:
    return max(10**-digits, round(cost, digits))


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
    return _that_fit([AUTOREGRESSIVE, *arms], n_layers)
