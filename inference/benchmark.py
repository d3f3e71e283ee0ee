"""Compare strategies: `python -m inference.benchmark --run DIR --strategies A,B,...`."""

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch

from inference.cli import (
    Parser,
    add_compile_argument,
    add_sampling_arguments,
    decoding_run_from,
    format_table,
    run_command,
    sampling_from,
    write_json,
)
from inference.measurement import AUTOREGRESSIVE, ArmResult, Workload, measure
from inference.plot import write_plot
from inference.prompts import add_prompt_arguments, prompts_from
from inference.self_speculative import SelfSpeculative
from inference.state import Strategy
from inference.strategies import STRATEGIES, parse_strategy
from inference.two_model import check_tokenizer

LEGEND = """
accept: drafted tokens accepted. a: agreement of a draft token given those before it were accepted.
c: a draft step, verify: a verification, in full steps. bound: best speedup for this a, d and c.
layers, heads: computed per new token, drafts included. depth: mean layers behind a token, where a
strategy may take fewer. identical, same: tokens equal to autoregressive's, all and what share."""


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.benchmark",
        description="Decode the same prompts with several strategies, taking turns, and compare"
        " speed, acceptance and tokens. No row stops before --max_new_tokens but at the end of the"
        " model's context.",
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
    parser.add_argument("--batch_size", type=int, default=1, help="prompts decoded at once")
    parser.add_argument("--repeats", type=int, default=3, help="times everything is measured")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the speedups here (PNG)")
    add_sampling_arguments(parser)
    add_compile_argument(parser)
    return parser


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
    """Return the results as text, one line for each arm."""
    header = "strategy tokens/s speedup bound of_bound accept a c verify tokens/round"
    header += " layers/token heads/token depth syncs/token prompt_s identical same"
    rows = []
    for r in results:
        same = "-" if r.same_tokens is None else "yes" if r.same_tokens == 1.0 else "no"
        rows.append(
            [r.settings, f"{r.tokens_per_second:.1f}", f"{r.speedup:.2f}x", _cell(r.bound, ".2f")]
            + [_cell(r.share_of_bound, ".0%"), _cell(r.acceptance_rate, ".1%")]
            + [_cell(r.agreement, ".3f"), _cell(r.draft_cost, ".3f"), _cell(r.verify_cost, ".2f")]
            + [_cell(r.tokens_per_verify, ".2f"), f"{r.layers_per_token:.2f}"]
            + [f"{r.heads_per_token:.2f}", _cell(r.mean_depth, ".2f")]
            + [f"{r.syncs_per_token:.2f}", f"{r.prefill_seconds:.3f}", same]
            + [_cell(r.same_tokens, ".1%")]
        )
    return format_table(header.split(), rows)


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


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def benchmark(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.repeats < 1 or args.batch_size < 1:
        raise ValueError(
            f"repeats: {args.repeats}, batch_size: {args.batch_size}, give at least 1 of each"
        )
    run = decoding_run_from(args)
    arms = expand_arms(
        args.strategies, args.E or (None,), args.d or (None,), run.model.config.n_layers
    )
    for arm in arms:
        check_tokenizer(arm, run)
    deepest = max((arm.d for arm in arms if isinstance(arm, SelfSpeculative)), default=0)
    if deepest + 2 > run.model.config.max_seq_len:
        raise ValueError(
            f"d: {deepest} drafted tokens do not fit the model's context of "
            f"{run.model.config.max_seq_len}, give at most {run.model.config.max_seq_len - 2}"
        )
    workload = Workload(
        prompts=prompts_from(run, args),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        sampling=sampling_from(args),
        seed=args.seed,
    )
    origin = machine()
    results = measure(run.model, arms, workload, repeats=args.repeats, report=_report)
    print(f"{run.checkpoint}, step {run.manifest.step}, {len(workload.prompts)} prompts")
    print(table(results))
    print(LEGEND)
    write_json(
        args.json,
        {
            "checkpoint": str(run.checkpoint),
            "step": run.manifest.step,
            "machine": origin,
            "device": str(run.model.head_weight.device),
            "dtype": str(run.model.head_weight.dtype).removeprefix("torch."),
            "workload": asdict(workload),
            "repeats": args.repeats,
            "compiled": args.compile,
            "arms": [asdict(result) for result in results],
        },
    )
    if args.plot is not None:
        write_plot(args.plot, results, f"{run.checkpoint.name}, {origin['cpu']}")


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), benchmark)


if __name__ == "__main__":
    main()
