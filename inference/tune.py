"""Find the fastest lossless strategy for a checkpoint: `python -m inference.tune --run DIR`.

What layers and head cost is measured, how often each exit agrees with the last layer is counted
along greedy continuations, the speedups of all E and d are worked out of the two, and the best of
them, with and without n-gram drafts and a stop rule, are confirmed by measurement.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from inference.autoregressive import EarlyExit
from inference.benchmark import machine, table
from inference.cli import (
    Parser,
    add_compile_argument,
    decoding_run_from,
    format_table,
    run_command,
    write_json,
)
from inference.decode import Generation, wait_for
from inference.dynamic import Dynamic
from inference.measurement import AUTOREGRESSIVE, ArmResult, Workload, measure
from inference.prompts import add_prompt_arguments, prompts_from
from inference.rows import fill_rows, open_state
from inference.sampling import Sampling
from inference.self_speculative import SelfSpeculative
from inference.state import DecodeState, Strategy
from inference.strategies import describe
from inference.tuned import write_tuned
from models.llama import NOTHING, Llama

_TIMINGS = 30


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model's passes cost here, in full steps of one token."""

    full_step_seconds: float
    draft: list[float]
    """c_E for E = 1, 2, ...: a step of the first E layers and the head."""
    verify: list[float]
    """v_d for d = 1, 2, ...: a pass of all layers and the head over d + 1 tokens."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What E and d promise."""

    E: int
    d: int
    agreement: float
    """a_E."""
    tokens_per_round: float
    draft_steps: float
    """Full steps a round spends on drafting, d c_E."""
    verify_steps: float
    """Full steps it spends on verification, v_d."""
    speedup: float
    """tokens_per_round / (draft_steps + verify_steps)."""


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.tune",
        description="Find the fastest lossless strategy for a checkpoint on this machine, greedy,"
        " and keep it beside the checkpoint, where generate finds it.",
        example="--run outputs/demo --max_d 6",
    )
    parser.add_argument("--max_d", type=int, default=6, help="most tokens drafted per round")
    parser.add_argument("--top", type=int, default=3, help="pairs of E and d to confirm")
    parser.add_argument("--repeats", type=int, default=3, help="times everything is measured")
    add_prompt_arguments(parser)
    add_compile_argument(parser)
    return parser


@torch.inference_mode()
def exit_agreement(model: Llama, rows: Sequence[Sequence[int]], first: int) -> list[float]:
    """Return a_E for E = 1, ..., L - 1: how often the exit says what the last layer says.

    Args:
        model: In eval mode.
        rows: Prompts with their greedy continuations.
        first: Length of the prompts; only what follows is looked at.
    """
    L = model.config.n_layers
    agreed, seen = [0] * (L - 1), 0
    for row in rows:
        h = model.embed(torch.tensor([row], device=model.norm.weight.device))
        _, exits = model.run_layers(h, 0, L, exit_layers=range(L))
        said = [model.exit_logits(exits[l][:, first - 1 : -1]).argmax(-1) for l in range(L)]
        seen += said[-1].numel()
        for l in range(L - 1):
            agreed[l] += int((said[l] == said[-1]).sum())
    return [count / seen for count in agreed]


@torch.inference_mode()
def measure_costs(model: Llama, rows: Sequence[Sequence[int]], max_d: int) -> Costs:
    """Time draft steps and verifications in the middle of `rows`, taking turns; medians."""
    L = model.config.n_layers
    state = open_state(
        model, len(rows), slots=max(map(len, rows)) + max_d + 1, sampling=Sampling(), seed=0
    )
    fill_rows(state, rows, (L, NOTHING))
    passes: dict[tuple[str, int], Callable[[], object]] = {("full", 0): _step(state, L)}
    passes |= {("draft", E): _step(state, E) for E in range(1, L)}
    passes |= {("verify", d): _verification(state, d) for d in range(1, max_d + 1)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
    for _ in range(_TIMINGS):
        for key, run in passes.items():
            start = time.perf_counter()
            run()
            wait_for(state.pending.device)
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    full = medians["full", 0]
    return Costs(
        full_step_seconds=full,
        draft=[medians["draft", E] / full for E in range(1, L)],
        verify=[medians["verify", d] / full for d in range(1, max_d + 1)],
    )


def _step(state: DecodeState, E: int) -> Callable[[], object]:
    decoder = EarlyExit(E=E).start(state)
    return lambda: decoder(1)


def _verification(state: DecodeState, d: int) -> Callable[[], object]:
    tokens = state.pending[:, None].expand(-1, d + 1)
    L = state.model.config.n_layers
    return lambda: state.distribution(state.run(state.model.embed(tokens), 0, L))


def predict(agreement: Sequence[float], costs: Costs) -> list[Prediction]:
    """Return what every E and d promise, the best first.

    Leviathan et al. (arXiv 2211.17192), theorem 3.8, with measured costs:
      speedup = (1 + a + ... + a^d) / (d c_E + v_d).
    """
    found = []
    for E, (a, c) in enumerate(zip(agreement, costs.draft, strict=True), start=1):
        for d, v in enumerate(costs.verify, start=1):
            tokens = sum(a**i for i in range(d + 1))
            found.append(
                Prediction(
                    E=E,
                    d=d,
                    agreement=a,
                    tokens_per_round=tokens,
                    draft_steps=d * c,
                    verify_steps=v,
                    speedup=tokens / (d * c + v),
                )
            )
    return sorted(found, key=lambda prediction: -prediction.speedup)


def candidates(best: Sequence[Prediction], costs: Costs, max_d: int) -> list[Strategy]:
    """Return what is to be confirmed: the best pairs, plain and with drafts that cost less."""
    arms: list[Strategy] = [AUTOREGRESSIVE]
    for prediction in best:
        E, d = prediction.E, prediction.d
        arms += [SelfSpeculative(E=E, d=d), SelfSpeculative(E=E, d=max_d, stop=0.5)]
        arms += [SelfSpeculative(E=E, d=max_d, stop=0.5, ngram=n) for n in (2, 3)]
    verify_cost = round(statistics.mean(costs.verify), 2)
    arms += [Dynamic(d=max_d, verify_cost=verify_cost, ngram=n) for n in (0, 2, 3)]
    return [*dict.fromkeys(arms)]


def cost_table(predictions: Sequence[Prediction], L: int) -> str:
    """Return, for each E, its best d and where the time of a round goes."""
    header = "E d a tokens/round draft verify speedup without_draft verify_as_step"
    rows = []
    for E in range(1, L):
        p = next(p for p in predictions if p.E == E)  # the best first
        free, cheap = p.tokens_per_round / p.verify_steps, p.tokens_per_round / (p.draft_steps + 1)
        rows.append(
            [str(E), str(p.d), f"{p.agreement:.3f}", f"{p.tokens_per_round:.2f}"]
            + [f"{p.draft_steps:.2f}", f"{p.verify_steps:.2f}", f"{p.speedup:.2f}x"]
            + [f"{free:.2f}x", f"{cheap:.2f}x"]
        )
    return format_table(header.split(), rows)


def tune(args: argparse.Namespace) -> None:
    """Run the command."""
    for name in ("max_d", "top", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: {getattr(args, name)}, give at least 1")
    run = decoding_run_from(args)
    model, L = run.model, run.model.config.n_layers
    if L < 2:
        raise ValueError(f"run: {run.checkpoint} has 1 layer, nothing can draft for it")
    prompts = prompts_from(run, args)
    first = min(map(len, prompts))
    plain = Generation(model, prompts, AUTOREGRESSIVE, max_new_tokens=args.max_new_tokens).finish()
    rows = [p + t for p, t in zip(plain.prompts, plain.tokens, strict=True)]
    agreement = exit_agreement(model, rows, first)
    middle = rows[0][: (len(rows[0]) + first) // 2]
    costs = measure_costs(model, [middle[: model.config.max_seq_len - args.max_d - 1]], args.max_d)
    predictions = predict(agreement, costs)
    print(f"{run.checkpoint}: a full step takes {costs.full_step_seconds * 1e3:.2f} ms\n")
    print("predicted, in full steps (without_draft: were drafts free; verify_as_step: were a")
    print("verification as cheap as a step):")
    print(cost_table(predictions, L))
    workload = Workload(
        prompts=prompts,
        max_new_tokens=args.max_new_tokens,
        batch_size=1,
        sampling=Sampling(),
        seed=0,
    )
    arms = candidates(predictions[: args.top], costs, args.max_d)
    results = measure(model, arms, workload, repeats=args.repeats, report=_report)
    print("\nmeasured:")
    print(table(results))
    best = max(zip(results, arms, strict=True), key=lambda pair: pair[0].speedup)
    found = {
        "machine": machine(),
        "compiled": args.compile,
        "agreement": agreement,
        "costs": asdict(costs),
        "predictions": [asdict(prediction) for prediction in predictions],
        "measured": [asdict(result) for result in results],
    }
    path = write_tuned(run, describe(best[1]), found)
    print(f"\n{_verdict(best[0])}; kept in {path}")
    write_json(args.json, found)


def _verdict(best: ArmResult) -> str:
    if best.strategy == AUTOREGRESSIVE.name:
        return "nothing beats plain decoding here: see which term above eats the gain"
    return f"best: {best.settings}, {best.speedup:.2f}x"


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), tune)


if __name__ == "__main__":
    main()
