"""Certify a threshold of CALM: `python -m inference.calibrate --run DIR --delta 0.1`.

Textual consistency (CALM, arXiv 2207.07061, section 4): the loss of a prompt is the share of its
new tokens that differ, position by position, from those of full decoding.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest

from data.command_line import run_command
from inference.cli.arguments import Count, RunOptions
from inference.cli.terminal import format_table, write_json
from inference.engine.generation import Generation
from inference.evaluation.prompts import PromptOptions, prompts_from
from inference.fitting.learn_then_test import certify, fewest_losses
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.registry import describe, parse_strategy
from models.llama import Llama


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(PromptOptions, RunOptions):
    """Certify a threshold of calm.

    The threshold is lowered step by step while it can be certified that, but with probability eps,
    at most a share delta of the tokens differs from those of full decoding.

    Example:
      python -m inference.calibrate --run outputs/demo --delta 0.1 --prompts 100 --max_new_tokens 32
    """

    strategy: str = "calm"
    """calm and its other settings."""
    delta: float = 0.1
    """Share of tokens that may differ."""
    eps: float = 0.05
    """Probability of being wrong."""
    steps: Count = 20
    """Thresholds between 1 and 0."""
    prompts: Count = 100
    """Number of prompts, held out or of a task; a --prompt_file gives all its lines. Certifying
    takes ln(eps) / ln(1 - delta) of them at least: 29 for the defaults."""


def token_losses(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    strategy: Calm,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> list[float]:
    """Return for each prompt the share of new tokens that differ from the reference's.

    Where one of the two goes on after the other's end, its tokens differ.
    """
    found = Generation(
        model,
        prompts,
        strategy,
        max_new_tokens=max_new_tokens,
        batch_size=8,
        stop_tokens=stop_tokens,
    ).finish()
    return [
        sum(a != b for a, b in zip_longest(ours, theirs)) / max(len(ours), len(theirs))
        for ours, theirs in zip(found.tokens, reference, strict=True)
    ]


def calibrate(options: CalibrateOptions) -> None:
    """Test thresholds in falling order; print and write which are certified."""
    for name, value in (("delta", options.delta), ("eps", options.eps)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}: {value}, give a number between 0 and 1")
    strategy = parse_strategy(options.strategy)
    if not isinstance(strategy, Calm):
        raise ValueError(f"strategy: {options.strategy}, only calm has a threshold to certify")
    run = options.open_run()
    strategy = strategy.validated(run.model.config.n_layers)
    prompts = prompts_from(run, options)
    needed = fewest_losses(options.delta, options.eps)
    if len(prompts) < needed:
        raise ValueError(
            f"prompts: {len(prompts)}, can certify no delta of {options.delta} with eps "
            f"{options.eps} even where no token differs, give at least {needed}"
        )
    most, stops = options.max_new_tokens, options.stop_tokens(run)
    reference = Generation(
        run.model,
        prompts,
        Autoregressive(),
        max_new_tokens=most,
        batch_size=8,
        stop_tokens=stops,
    ).finish()

    def losses(threshold: float) -> list[float]:
        print(f"threshold {threshold:.3f}", file=sys.stderr, flush=True)
        rule = replace(strategy, threshold=threshold)
        return token_losses(run.model, prompts, reference.tokens, rule, most, stops)

    thresholds = [1.0 - i / options.steps for i in range(options.steps + 1)]
    tested = certify(thresholds, losses, delta=options.delta, eps=options.eps)
    rows = [
        [f"{t.threshold:.3f}", f"{t.risk:.4f}", f"{t.p_value:.4f}", "yes" if t.certified else "no"]
        for t in tested
    ]
    print(f"{run.checkpoint}: {len(prompts)} prompts, delta {options.delta}, eps {options.eps}")
    print(format_table(["threshold", "risk", "p_value", "certified"], rows))
    certified = [t.threshold for t in tested if t.certified]
    if certified:
        print(f"use {describe(replace(strategy, threshold=round(min(certified), 6)))}")
    else:
        print("nothing can be certified: give more prompts, or a larger delta or eps")
    write_json(options.json, [asdict(t) for t in tested])


def main() -> None:
    run_command(CalibrateOptions, calibrate, prog="python -m inference.calibrate")


if __name__ == "__main__":
    main()
