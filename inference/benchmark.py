"""Compare strategies: `python -m inference.benchmark --run DIR --strategies A,B,...`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from data.command_line import run_command
from inference.cli.arguments import (
    Count,
    Counts,
    DecodingOptions,
    Names,
    PictureFile,
    SamplingOptions,
)
from inference.cli.terminal import report_line, write_json
from inference.engine.strategy import Strategy
from inference.evaluation.arm_result import ArmResult
from inference.evaluation.candidates import check_draft_fits, expand_arms
from inference.evaluation.exit_traces import record_continuations
from inference.evaluation.measurement import Workload, measure
from inference.evaluation.oracle import find_oracle
from inference.evaluation.plot import write_plot
from inference.evaluation.prompts import PromptOptions, PromptSet, prompt_set_from
from inference.evaluation.report import LEGEND, comparison, describe_setting
from inference.loading.machine import machine, processor
from inference.loading.run import Run
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import STRATEGIES
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.speculative import check_tokenizer


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(SamplingOptions, PromptOptions, DecodingOptions):
    """Decode the same prompts with several strategies, taking turns, and compare them.

    Speed, acceptance, tokens and quality are measured. Beside every strategy that saves layers
    early exit at its mean depth is measured. A row ends as in generation: at EOS, at
    --max_new_tokens or at the end of the model's context.

    Example:
      python -m inference.benchmark --run outputs/demo --E 2,3 --d 2,4 --plot speedup.png
    """

    strategies: Annotated[
        Names,
        tyro.conf.arg(
            help="Which to compare, each a name or name:setting=value:setting=value, of "
            f"{', '.join(STRATEGIES)}; autoregressive is always measured."
        ),
    ] = ("autoregressive", "early_exit", "self_speculative")
    E: Counts | None = None
    """Layers run before the exit, each in turn; a quarter of the model's if not given."""
    d: Counts | None = None
    """Tokens drafted per round, each in turn; 4 if not given."""
    batch_size: Counts = (1,)
    """Prompts decoded at once, each number in turn."""
    repeats: Count = 3
    """Times everything is measured, after a warm-up."""
    plot: PictureFile | None = None
    """Draw speedups, agreement by exit and quality here (.png, .svg, .pdf, .jpg)."""

    def strategies_for(self, n_layers: int) -> tuple[str, ...]:
        """Return the strategies; of those not asked for, the ones a model of one layer has."""
        if n_layers == 1 and self.strategies == BenchmarkOptions.strategies:
            return (Autoregressive.name,)
        return self.strategies


def benchmark(options: BenchmarkOptions) -> None:
    """Measure every arm at every batch size; print, write and draw what was measured."""
    run = options.open_run()
    n_layers = run.model.config.n_layers
    strategies = options.strategies_for(n_layers)
    arms = expand_arms(strategies, options.E or (None,), options.d or (None,), n_layers)
    _check(arms, run)
    prompt_set = prompt_set_from(run, options)
    batch_sizes = [*dict.fromkeys(options.batch_size)]
    workloads = [
        Workload(
            prompts=prompt_set.prompts,
            max_new_tokens=options.max_new_tokens,
            batch_size=batch_size,
            sampling=options.sampling,
            seed=options.seed,
            stop_tokens=options.stop_tokens(run),
        )
        for batch_size in batch_sizes
    ]
    results: list[ArmResult] = []
    setting = describe_setting(run, options)
    for workload in workloads:
        found = _measure(run, arms, workload, options.repeats, prompt_set)
        print(comparison(found, setting) + "\n")
        results += found
    print(LEGEND)
    write_json(
        options.json,
        {
            "checkpoint": str(run.checkpoint),
            "step": run.manifest.step,
            "machine": machine(),
            "device": str(run.model.head_weight.device),
            "dtype": str(run.model.head_weight.dtype).removeprefix("torch."),
            "workload": asdict(workloads[0]) | {"batch_size": batch_sizes, "task": options.task},
            "ignore_eos": options.ignore_eos,
            "repeats": options.repeats,
            "compiled": options.compile,
            "quantize": options.quantize,
            "base": results[0].strategy,
            "arms": [asdict(result) for result in results],
        },
    )
    if options.plot is not None:
        _draw(options.plot, run, workloads[0], results, setting)


def _draw(
    path: Path, run: Run, workload: Workload, results: Sequence[ArmResult], setting: str
) -> None:
    """Draw the results, and what every exit predicts along the greedy continuations."""
    traces = record_continuations(
        run.model,
        workload.prompts,
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
        stop_tokens=workload.stop_tokens,
    )
    title = f"{run.checkpoint.name}, {setting}, {processor(run.model.head_weight.device)}"
    write_plot(path, results, find_oracle(traces).agreement, title)


def _check(arms: Sequence[Strategy], run: Run) -> None:
    """Refuse what does not fit the run, before anything is measured."""
    for arm in arms:
        check_tokenizer(arm, run)
    deepest = max((arm.d for arm in arms if isinstance(arm, SelfSpeculative)), default=0)
    check_draft_fits("d", deepest, run)


def _measure(
    run: Run, arms: Sequence[Strategy], workload: Workload, repeats: int, prompt_set: PromptSet
) -> list[ArmResult]:
    prompts = f"{len(workload.prompts)} prompts, {workload.batch_size} at once"
    print(f"{run.checkpoint}, step {run.manifest.step}, {prompts}", flush=True)
    return measure(
        run.model,
        arms,
        workload,
        repeats=repeats,
        report=report_line,
        with_static=True,
        score=partial(prompt_set.scores, run),
        graphs=run.graphs,
    )


def main() -> None:
    run_command(BenchmarkOptions, benchmark, prog="python -m inference.benchmark")


if __name__ == "__main__":
    main()
