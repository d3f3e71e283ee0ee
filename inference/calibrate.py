"""Certify a threshold of CALM: `python -m inference.calibrate --run DIR --delta 0.1`.

Textual consistency (CALM, arXiv 2207.07061, section 4): the loss of a prompt is the share of its
new tokens that differ, place by place, from those of full decoding.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from inference.cli.arguments import Parser, run_command, run_from
from inference.cli.terminal import format_table, write_json
from inference.engine.generation import Generation
from inference.evaluation.prompts import add_prompt_arguments, prompts_from
from inference.fitting.learn_then_test import certify
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.registry import describe, parse_strategy
from models.llama import Llama


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.calibrate",
        description="Lower calm's threshold step by step while it can be certified that, but with"
        " probability eps, at most a share delta of its tokens differs from full decoding's.",
        example="--run outputs/demo --delta 0.1 --prompts 100 --max_new_tokens 32",
    )
    parser.add_argument("--strategy", default="calm", help="calm and its other settings")
    parser.add_argument("--delta", type=float, default=0.1, help="share of tokens that may differ")
    parser.add_argument("--eps", type=float, default=0.05, help="probability of being wrong")
    parser.add_argument("--steps", type=int, default=20, help="thresholds between 1 and 0")
    add_prompt_arguments(parser)
    return parser


def token_losses(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    strategy: Calm,
    max_new_tokens: int,
) -> list[float]:
    """Return for each prompt the share of new tokens that differ from the reference's."""
    found = Generation(
        model, prompts, strategy, max_new_tokens=max_new_tokens, batch_size=8
    ).finish()
    return [
        sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(theirs)
        for ours, theirs in zip(found.tokens, reference, strict=True)
    ]


def calibrate(args: argparse.Namespace) -> None:
    """Run the command."""
    for name in ("delta", "eps"):
        if not 0.0 < getattr(args, name) < 1.0:
            raise ValueError(f"{name}: {getattr(args, name)}, give a number between 0 and 1")
    if args.steps < 1:
        raise ValueError(f"steps: {args.steps}, give at least 1")
    strategy = parse_strategy(args.strategy)
    if not isinstance(strategy, Calm):
        raise ValueError(f"strategy: {args.strategy}, only calm has a threshold to certify")
    run = run_from(args)
    strategy = strategy.validated(run.model.config.n_layers)
    prompts = prompts_from(run, args)
    reference = Generation(
        run.model, prompts, Autoregressive(), max_new_tokens=args.max_new_tokens, batch_size=8
    ).finish()

    def losses(threshold: float) -> list[float]:
        print(f"threshold {threshold:.3f}", file=sys.stderr, flush=True)
        rule = replace(strategy, threshold=threshold)
        return token_losses(run.model, prompts, reference.tokens, rule, args.max_new_tokens)

    thresholds = [1.0 - i / args.steps for i in range(args.steps + 1)]
    tested = certify(thresholds, losses, delta=args.delta, eps=args.eps)
    rows = [
        [f"{t.threshold:.3f}", f"{t.risk:.4f}", f"{t.p_value:.4f}", "yes" if t.certified else "no"]
        for t in tested
    ]
    print(f"{run.checkpoint}: {len(prompts)} prompts, delta {args.delta}, eps {args.eps}")
    print(format_table(["threshold", "risk", "p_value", "certified"], rows))
    certified = [t.threshold for t in tested if t.certified]
    if certified:
        print(f"use {describe(replace(strategy, threshold=round(min(certified), 6)))}")
    else:
        print("nothing can be certified: give more prompts, or a larger delta or eps")
    write_json(args.json, [asdict(t) for t in tested])


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), calibrate)


if __name__ == "__main__":
    main()
