"""What is measured for a report where no file has it: exits, costs, strategies."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from inference.cli.terminal import report_line
from inference.engine.strategy import Strategy
from inference.evaluation.arm_result import ArmResult
from inference.evaluation.candidates import candidates, predict_speedups
from inference.evaluation.costs import Costs
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.evaluation.prediction import Prediction
from inference.evaluation.round_breakdown import round_terms
from inference.loading.machine import machine
from inference.loading.run import Run
from inference.report_page.measurements import Arms, Tuning, arms_from
from inference.report_page.source import OWN, Source, date_of, machine_line
from inference.strategies.calm import Calm
from inference.strategies.early_exit import EarlyExit

MAX_D = 6
"""Most tokens drafted in a round."""
_TIMINGS = 4
_PAIRS = 2
_THRESHOLDS = (0.5, 0.9)


def measure_speeds(
    run: Run,
    workload: Workload,
    *,
    repeats: int,
    tuning: Tuning | None,
) -> tuple[Tuning | None, Arms]:
    """Measure the costs of passes, unless they are known, and the strategies side by side.

    Returns:
        The tuning, None for a model of one layer, and the arms.
    """
    L = run.model.config.n_layers
    here = machine()
    found = None
    if tuning is not None:
        costs, predictions = tuning.costs, tuning.predictions
    elif L > 1:
        report_line(f"measuring: costs of passes and rounds, up to {MAX_D} drafted tokens")
        found = predict_speedups(run, workload, max_d=_max_d(run), timings=_TIMINGS)
        costs, predictions = found
    arms = _arms(costs, predictions, L) if L > 1 else [AUTOREGRESSIVE]
    report_line(
        f"measuring: {len(arms)} strategies, {len(workload.prompts)} prompts, up to "
        f"{workload.max_new_tokens} new tokens, {repeats} repeats"
    )
    results = measure(
        run.model,
        arms,
        workload,
        repeats=repeats,
        report=report_line,
        graphs=run.graphs,
        timings=_TIMINGS,
    )
    source = Source(OWN, _how(workload, repeats), machine_line(here), date_of(here))
    if found is not None:
        how = f"median of {_TIMINGS} timings of each pass"
        tuning = _tuning(*found, results, replace(source, how=how))
    return tuning, Arms(arms_from([asdict(result) for result in results]), source)


def _tuning(
    costs: Costs, predictions: Sequence[Prediction], results: Sequence[ArmResult], source: Source
) -> Tuning:
    drafting = [r for r in results if r.strategy == AUTOREGRESSIVE.name or r.drafts["drafted_at"]]
    return Tuning(costs, predictions, round_terms(drafting, costs), source)


def _max_d(run: Run) -> int:
    return min(MAX_D, run.model.config.max_seq_len - 2)


def _how(workload: Workload, repeats: int) -> str:
    prompts = f"{len(workload.prompts)} prompt" + "s" * (len(workload.prompts) != 1)
    times = "one run" if repeats == 1 else f"median and range of {repeats} repeats"
    return f"{prompts}, up to {workload.max_new_tokens} new tokens, batch 1, greedy, {times}"


def _arms(costs: Costs, predictions: Sequence[Prediction], L: int) -> list[Strategy]:
    """Return early exit at a quarter, half and three quarters, CALM, and the best drafts."""
    best = {p.E: p for p in reversed(predictions)}
    few = sorted(best.values(), key=lambda p: -p.speedup)[:_PAIRS]
    depths = sorted({max(1, min(L - 1, round(L * share))) for share in (0.25, 0.5, 0.75)})
    drafts = candidates(few, costs, len(costs.layers) - 1, top=_PAIRS, ngrams=(2,))
    early: list[Strategy] = [EarlyExit(E=E) for E in depths]
    early += [Calm(threshold=threshold) for threshold in _THRESHOLDS]
    return [AUTOREGRESSIVE, *early, *drafts[1:]]
