"""The strategies that `benchmark` and `tune` measure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from inference.engine.strategy import Strategy
from inference.evaluation.costs import Costs, measure_costs
from inference.evaluation.exit_traces import decode_rows, record_acceptance
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload
from inference.evaluation.prediction import Prediction, predict
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


def predict_speedups(
    run: Run, workload: Workload, *, max_d: int, max_branch: int = 1, timings: int
) -> tuple[Costs, list[Prediction]]:
    """Record exits and measure costs; return them and the speedups that follow, the best first.

    Args:
        run: The checkpoint.
        workload: The texts to decode.
        max_d: Most tokens drafted in a round.
        max_branch: Most candidates for each.
        timings: Times each pass is timed.
    """
    model, branch = run.model, min(max_branch, run.model.config.vocab_size)
    rows = decode_rows(
        model,
        workload.prompts,
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
        stop_tokens=workload.stop_tokens,
        sampling=workload.sampling,
        seed=workload.seed,
    )
    chances = [
        record_acceptance(model, row, len(prompt), workload.sampling, branch, workload.seed)
        for row, prompt in zip(rows, workload.prompts, strict=True)
    ]
    middle = [
        row[: min((len(row) + len(prompt)) // 2, model.config.max_seq_len - max_d - 1)]
        for row, prompt in zip(rows[: workload.batch_size], workload.prompts, strict=False)
    ]
    costs = measure_costs(
        model,
        middle,
        max_d,
        workload.sampling,
        branch=branch,
        graphs=run.graphs,
        timings=timings,
    )
    return costs, predict(chances, costs, max_d)


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
    # Below a full step, which it holds, a cost is noise, and lookups would pay though none agrees.
    lookup = max(1.0, _rounded(costs.lookup))
    arms += [replace(dynamic, lookup_cost=lookup, ngram=n) for n in ngrams]
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
