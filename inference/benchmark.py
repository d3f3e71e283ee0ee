"""Compare strategies: `python -m inference.benchmark --run DIR --strategies A,B,...`."""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import torch

from inference.cli.arguments import (
    Parser,
    add_compile_argument,
    add_sampling_arguments,
    decoding_run_from,
    format_table,
    picture_file,
    report_line,
    run_command,
    sampling_from,
    write_json,
)
from inference.engine.strategy import Strategy
from inference.evaluation.measurement import AUTOREGRESSIVE, ArmResult, Workload, measure
from inference.evaluation.plot import write_plot
from inference.evaluation.prompts import PromptSet, add_prompt_arguments, prompt_set_from
from inference.loading.run import Run
from inference.oracle import find_oracle, record_continuations
from inference.strategies.registry import STRATEGIES, parse_strategy
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.two_model import check_tokenizer
from models.llama import Llama

LEGEND = """speedup: over autoregressive in the same repeat. layers, heads: computed per new
token, drafts included. depth: mean layers behind a token, where a strategy tells. syncs: times
the host waited per token. prompt_s: seconds for all prompts. MiB: CUDA: most memory allocated,
weights included; CPU: growth of the peak resident set. same: tokens equal to autoregressive's,
place by place. chosen: tokens the full model finds most probable after those before them. ln_p:
log likelihood of what was written under the full model, nats per token.
accept: drafted tokens accepted. a: agreement of a draft token given those before it were
accepted. c: a draft step, verify: a verification, in full steps. bound: best speedup for this a,
d and c."""


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
        parse_strategy(name, E=E, d=d).filled(n_layers)
        for name, E, d in product(strategies, exits, draft_tokens)
    ]
    arms = [*dict.fromkeys(arms)]
    if problems := [problem for arm in arms for problem in arm.problems(n_layers)]:
        raise ValueError("; ".join(problems))
    return arms


def table(results: list[ArmResult]) -> str:
    """Return the results as text, one line for each arm, and a second table of the drafts."""
    header = "strategy tok/s speedup layers heads depth syncs prompt_s MiB same chosen ln_p"
    rows = [
        [r.settings, f"{r.tokens_per_second:.1f}", f"{r.speedup:.2f}x", f"{r.layers_per_token:.2f}"]
        + [f"{r.heads_per_token:.2f}", _cell(r.mean_depth, ".2f"), f"{r.syncs_per_token:.2f}"]
        + [f"{r.prefill_seconds:.3f}", _cell(r.peak_bytes and r.peak_bytes / 2**20, ".1f")]
        + ["yes" if r.same_tokens == 1.0 else _cell(r.same_tokens, ".1%")]
        + [f"{r.full_choice:.1%}", f"{r.log_likelihood:.3f}"]
        + [f"{value:.3f}" for value in r.scores.values()]
        for r in results
    ]
    text = format_table([*header.split(), *results[0].scores], rows)
    drafts = [
        [r.settings, _cell(r.acceptance_rate, ".1%"), _cell(r.tokens_per_verify, ".2f")]
        + [_cell(r.agreement, ".3f"), _cell(r.draft_cost, ".3f"), _cell(r.verify_cost, ".2f")]
        + [f"{r.speedup:.2f}x", _cell(r.bound, ".2f"), _cell(r.share_of_bound, ".0%")]
        for r in results
        if r.acceptance_rate is not None
    ]
    if not drafts:
        return text
    header = "strategy accept tok/round a c verify speedup bound of_bound"
    return f"{text}\n\n{format_table(header.split(), drafts)}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def machine() -> dict[str, str | int | None]:
    """Say where the numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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


def check_draft_fits(name: str, d: int, run: Run) -> None:
    """Make sure that drafts of d tokens, which argument `name` asks for, can be timed.

    Raises:
        ValueError: the context has no room for a token, d drafted ones and the one after.
    """
    longest = run.model.config.max_seq_len
    if d + 2 > longest:
        raise ValueError(
            f"{name}: {d} drafted tokens do not fit the model's context of {longest}, give at "
            f"most {longest - 2}"
        )


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
