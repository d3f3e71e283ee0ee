"""Compare strategies: `python -m inference.benchmark --run DIR --strategies A,B,...`."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product

from inference.cli.arguments import (
    Parser,
    add_compile_argument,
    add_sampling_arguments,
    decoding_run_from,
    picture_file,
    run_command,
    sampling_from,
)
from inference.cli.terminal import report_line, write_json
from inference.engine.strategy import Strategy
from inference.evaluation.greedy_traces import find_oracle, record_continuations
from inference.evaluation.measurement import AUTOREGRESSIVE, ArmResult, Workload, measure
from inference.evaluation.plot import write_plot
from inference.evaluation.prompts import PromptSet, add_prompt_arguments, prompt_set_from
from inference.evaluation.report import LEGEND, check_draft_fits, machine, table
from inference.loading.run import Run
from inference.strategies.registry import STRATEGIES, parse_strategy
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.speculative import check_tokenizer
from models.llama import Llama


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.benchmark",
        description="Decode the same prompts with several strategies, taking turns, and compare"
        " speed, acceptance, tokens and quality. Beside every strategy that saves layers early exit"
        " at its mean depth is measured. No row stops before --max_new_tokens but at the end of the"
        " model's context; a task's answers are cut where they end before they are scored.",
        example="--run outputs/demo"
        " --strategies early_exit,self_speculative --E 2,3 --d 2,4 --plot speedup.png",
    )
    parser.add_argument(
        "--strategies",
        type=names,
        default="autoregressive,early_exit,self_speculative",
        metavar="A,B,...",
        help="which to compare, each a name or name:setting=value:setting=value, of "
        + ", ".join(STRATEGIES)
        + "; autoregressive is always measured",
    )
    parser.add_argument(
        "--E",
        type=names,
        metavar="N,...",
        help="layers run before the exit, each in turn; a quarter of the model's if not given",
    )
    parser.add_argument(
        "--d",
        type=names,
        metavar="N,...",
        help="tokens drafted per round, each in turn; 4 if not given",
    )
    add_prompt_arguments(parser)
    _add_measurement_arguments(parser)
    add_sampling_arguments(parser)
    add_compile_argument(parser)
    return parser


def _add_measurement_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--batch_size",
        type=names,
        default="1",
        metavar="N,...",
        help="prompts decoded at once, each number in turn",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="times everything is measured, after a warm-up"
    )
    parser.add_argument(
        "--plot",
        type=picture_file,
        metavar="PATH",
        help="draw speedups, agreement by exit and quality here (.png, .svg, .pdf, .jpg)",
    )


def names(text: str) -> list[str]:
    """Split a list of names at its commas."""
    return [name.strip() for name in text.split(",")]


def expand_arms(
    strategies: list[str],
    exits: Sequence[str | None],
    draft_tokens: Sequence[str | None],
    n_layers: int,
) -> list[Strategy]:
    """Return every combination that differs, autoregressive decoding first.

    Raises:
        ValueError: a name is unknown, or E or d does not fit the model.
    """
    arms = [AUTOREGRESSIVE] + [
        parse_strategy(name, E=E, d=d).with_defaults(n_layers)
        for name, E, d in product(strategies, exits, draft_tokens)
    ]
    arms = [*dict.fromkeys(arms)]
    if problems := [problem for arm in arms for problem in arm.problems(n_layers)]:
        raise ValueError("; ".join(problems))
    return arms


def benchmark(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.repeats < 1:
        raise ValueError(f"repeats: {args.repeats}, give at least 1")
    batch_sizes = [*dict.fromkeys(map(_batch_size, args.batch_size))]
    run = decoding_run_from(args)
    arms = expand_arms(
        args.strategies, args.E or (None,), args.d or (None,), run.model.config.n_layers
    )
    _check(arms, run)
    prompt_set, origin = prompt_set_from(run, args), machine()
    workloads = [
        Workload(
            prompts=prompt_set.prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=batch_size,
            sampling=sampling_from(args),
            seed=args.seed,
        )
        for batch_size in batch_sizes
    ]
    results = []
    for workload in workloads:
        results += _measure_and_print(run, arms, workload, args.repeats, prompt_set)
    print(LEGEND)
    write_json(
        args.json,
        {
            "checkpoint": str(run.checkpoint),
            "step": run.manifest.step,
            "machine": origin,
            "device": str(run.model.head_weight.device),
            "dtype": str(run.model.head_weight.dtype).removeprefix("torch."),
            "workload": asdict(workloads[0]) | {"batch_size": batch_sizes, "task": args.task},
            "repeats": args.repeats,
            "compiled": args.compile,
            "quantize": args.quantize,
            "arms": [asdict(result) for result in results],
        },
    )
    if args.plot is not None:
        agreement = agreement_by_exit(run.model, workloads[0])
        write_plot(args.plot, results, agreement, f"{run.checkpoint.name}, {origin['cpu']}")


def _measure_and_print(
    run: Run, arms: Sequence[Strategy], workload: Workload, repeats: int, prompt_set: PromptSet
) -> list[ArmResult]:
    prompts = f"{len(workload.prompts)} prompts, {workload.batch_size} at once"
    print(f"{run.checkpoint}, step {run.manifest.step}, {prompts}", flush=True)
    found = measure(
        run.model,
        arms,
        workload,
        repeats=repeats,
        report=report_line,
        with_static=True,
        score=partial(prompt_set.scores, run),
        graphs=run.graphs,
    )
    print(table(found) + "\n")
    return found


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"batch_size: {text}, give whole numbers, at least 1")
    return int(text)


def _check(arms: Sequence[Strategy], run: Run) -> None:
    """Refuse what does not fit the run, before anything is measured."""
    for arm in arms:
        check_tokenizer(arm, run)
    deepest = max((arm.d for arm in arms if isinstance(arm, SelfSpeculative)), default=0)
    check_draft_fits("d", deepest, run)


def agreement_by_exit(model: Llama, workload: Workload) -> list[float]:
    """Return, for E = 1, 2, ..., how often the exit says what the last layer says.

    Counted along the greedy continuations of the workload's prompts.
    """
    _, traces = record_continuations(
        model,
        workload.prompts,
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
    )
    return find_oracle(traces).agreement


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), benchmark)


if __name__ == "__main__":
    main()
