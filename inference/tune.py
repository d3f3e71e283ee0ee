"""Find the fastest strategy for a checkpoint on this machine: `python -m inference.tune --run DIR`.

For lossless drafts, the costs of passes and rounds are measured, the chance that every exit's
drafts are accepted is recorded along continuations, the speedups of all E, d and branch follow
from the two, and the best of them, with and without n-gram drafts and a stop rule, are confirmed by
measurement. For a strategy with a threshold, thresholds are measured that keep to the full model's
choice.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import tyro

from data.command_line import run_command
from inference.cli.arguments import Count, DecodingOptions, Numbers, SamplingOptions
from inference.cli.terminal import report_line, write_json
from inference.engine.strategy import Strategy
from inference.evaluation.arm_result import ArmResult
from inference.evaluation.candidates import (
    candidates,
    check_draft_fits,
    predict_speedups,
    with_thresholds,
)
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.evaluation.prompts import PromptOptions, prompts_from
from inference.evaluation.report import LEGEND, comparison, describe_setting, speed_range
from inference.evaluation.round_breakdown import (
    PREDICTION_LEGEND,
    ROUND_LEGEND,
    leaves_line,
    prediction_table,
    round_table,
    round_terms,
)
from inference.evaluation.timing import TIMINGS
from inference.loading.machine import machine
from inference.loading.run import Run
from inference.loading.tuned import Tuned, conditions_of, write_tuned
from inference.strategies.self_speculative import SelfSpeculative


@dataclass(frozen=True, kw_only=True)
class TuneOptions(SamplingOptions, PromptOptions, DecodingOptions):
    """Find the fastest lossless strategy for a checkpoint on this machine, and keep it.

    It is kept beside the checkpoint, and generate decodes with it under the same conditions: batch
    size, temperature, dtype, device. Or find the fastest threshold of a strategy that has one,
    which generate takes where it is given the strategy's name alone.

    Example:
      python -m inference.tune --run outputs/demo --quick
    """

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """At most 2 prompts, 64 tokens, 3 repeats, the best predicted shape: seconds, less certain."""
    strategy: str = SelfSpeculative.name
    """self_speculative, which includes dynamic; or one with a threshold, such as calm, as text."""
    min_agreement: float = 0.99
    """With a threshold: least share of tokens that the full model finds most probable."""
    thresholds: Numbers = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Thresholds to try."""
    max_d: Count = 6
    """Most tokens drafted per round."""
    max_branch: Count = 3
    """Most candidates for each."""
    top: Count = 3
    """Shapes, of E, d and branch, to confirm."""
    batch_size: Count = 1
    """Prompts decoded at once."""
    repeats: Count = 3
    """Times everything is measured."""

    @property
    def timings(self) -> int:
        """Times each pass is timed."""
        return 3 if self.quick else TIMINGS

    @property
    def ngrams(self) -> tuple[int, ...]:
        """Lengths of n-grams to try."""
        return (2,) if self.quick else (2, 3)

    def limited(self) -> Self:
        """Return the options as they are, or the quick form of them."""
        if not self.quick:
            return self
        return replace(
            self,
            prompts=min(self.prompts, 2),
            max_new_tokens=min(self.max_new_tokens, 64),
            repeats=min(self.repeats, 3),
            top=1,
        )


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The result of tuning."""

    name: str | None
    """The strategy whose threshold was tuned; None: the fastest lossless one was looked for."""
    strategy: str | None
    """The best, as a user writes it; None: no threshold is of use."""
    answer: str
    """The same in words."""
    tables: str
    content: dict[str, Any]
    """The measurements behind it."""


def tune(options: TuneOptions) -> None:
    """Measure, keep the best beside the checkpoint, and print it, then the tables behind it."""
    options = options.limited()
    if not 0.0 <= options.min_agreement <= 1.0:
        raise ValueError(f"min_agreement: {options.min_agreement}, give a share from 0 to 1")
    run = options.open_run()
    if run.model.config.n_layers < 2:
        raise ValueError(
            f"run: {run.checkpoint} has 1 layer, nothing can be left out, decode plainly"
        )
    workload = _workload(run, options)
    drafts = options.strategy == SelfSpeculative.name
    outcome = (_tune_drafts if drafts else _tune_threshold)(run, workload, options)
    conditions = conditions_of(
        run,
        batch_size=options.batch_size,
        quantize=options.quantize,
        temperature=options.sampling.temperature,
    )
    tuned = Tuned(strategy=outcome.strategy, conditions=conditions)
    content = {"machine": machine(), **outcome.content}
    path = write_tuned(run, outcome.name, tuned, content)
    print(f"{outcome.answer}; kept in {path}\n\n{outcome.tables}")
    write_json(options.json, asdict(tuned) | content)


def _workload(run: Run, options: TuneOptions) -> Workload:
    prompts = prompts_from(run, options)
    return Workload(
        prompts=prompts[: options.prompts] if options.quick else prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        sampling=options.sampling,
        seed=options.seed,
        stop_tokens=options.stop_tokens(run),
    )


def _tune_drafts(run: Run, workload: Workload, options: TuneOptions) -> _Outcome:
    """Find the fastest lossless strategy."""
    check_draft_fits("max_d", options.max_d, run)
    costs, predictions = predict_speedups(
        run,
        workload,
        max_d=options.max_d,
        max_branch=options.max_branch,
        timings=options.timings,
    )
    arms = candidates(predictions, costs, options.max_d, top=options.top, ngrams=options.ngrams)
    results = _measure(run, arms, workload, options)
    rounds = round_terms(results, costs)
    best = fastest(results)
    answer = f"best: {best.settings}, {_speedup(best)} the speed of plain decoding"
    if best.strategy == AUTOREGRESSIVE.name:
        answer = "best: autoregressive, nothing measured below beats plain decoding in every repeat"
    tables = [
        f"{run.checkpoint}: a full step takes {costs.full_step_seconds * 1e3:.2f} ms",
        f"predicted:\n{prediction_table(predictions, run.model.config.n_layers)}",
        leaves_line(predictions),
        PREDICTION_LEGEND,
        f"measured:\n{comparison(results, describe_setting(run, options))}",
        LEGEND,
        f"rounds, in full steps:\n{round_table(rounds)}",
        ROUND_LEGEND,
    ]
    content = {
        "costs": asdict(costs),
        "predictions": [asdict(p) | {"speedup": p.speedup} for p in predictions],
        "measured": [asdict(result) for result in results],
        "rounds": rounds,
    }
    return _Outcome(
        name=None,
        strategy=best.settings,
        answer=answer,
        tables="\n\n".join(tables),
        content=content,
    )


def _tune_threshold(run: Run, workload: Workload, options: TuneOptions) -> _Outcome:
    """Find the fastest threshold that keeps to the full model."""
    arms = with_thresholds(options.strategy, options.thresholds, run.model.config.n_layers)
    results = _measure(run, arms, workload, options)
    least, name = options.min_agreement, arms[-1].name
    best = fastest(results, least)
    found = None if best.strategy == AUTOREGRESSIVE.name else best.settings
    if found is None:
        answer = f"no threshold that agrees in {least:.1%} of the tokens beats plain decoding"
    else:
        answer = f"best: {best.settings}, {_speedup(best)}, taken by --strategy {name} alone"
    return _Outcome(
        name=name,
        strategy=found,
        answer=answer,
        tables=f"measured:\n{comparison(results, describe_setting(run, options))}\n\n{LEGEND}",
        content={"min_agreement": least, "measured": [asdict(result) for result in results]},
    )


def _speedup(result: ArmResult) -> str:
    """Return a speedup and its range over the repeats."""
    found = speed_range(result)
    return f"{result.speedup:.2f}x" + ("" if found == "-" else f" ({found})")


def fastest(results: Sequence[ArmResult], min_agreement: float = 0.0) -> ArmResult:
    """Return the fastest arm that was faster than plain decoding in every repeat, or that.

    Args:
        results: The arms, autoregressive decoding first.
        min_agreement: Least share of tokens that the full model finds most probable.
    """
    fit = [
        result
        for result in results[1:]
        if result.full_choice >= min_agreement
        and result.first_difference != "fault"
        and min(result.speedups) > 1.0
    ]
    return max(fit, key=lambda result: result.speedup, default=results[0])


def _measure(
    run: Run, arms: Sequence[Strategy], workload: Workload, options: TuneOptions
) -> list[ArmResult]:
    return measure(
        run.model,
        arms,
        workload,
        repeats=options.repeats,
        report=report_line,
        graphs=run.graphs,
        timings=options.timings,
    )


def main() -> None:
    run_command(TuneOptions, tune, prog="python -m inference.tune")


if __name__ == "__main__":
    main()
