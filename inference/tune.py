"""Find the fastest strategy for a checkpoint on this machine: `python -m inference.tune --run DIR`.

For lossless drafts, what rounds and passes cost is measured, what each exit says is recorded along
greedy continuations, the speedups of all E and d are worked out of the two, and the best of them,
with and without n-gram drafts and a stop rule, are confirmed by measurement. For a strategy with a
threshold, thresholds are measured that keep to what the full model would have chosen.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inference.cli.arguments import Parser, add_compile_argument, decoding_run_from, run_command
from inference.cli.terminal import format_table, report_line, write_json
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.evaluation.candidates import candidates, with_thresholds
from inference.evaluation.costs import Costs, Prediction, measure_costs, predict
from inference.evaluation.greedy_traces import record_continuations
from inference.evaluation.measurement import AUTOREGRESSIVE, ArmResult, Workload, measure
from inference.evaluation.prompts import add_prompt_arguments, prompts_from
from inference.evaluation.report import LEGEND, check_draft_fits, machine, table
from inference.loading.run import Run
from inference.loading.tuned import Tuned, conditions_of, write_tuned
from inference.strategies.self_speculative import SelfSpeculative

_COST_LEGEND = """In full steps: draft: single tokens in the first layers; verify: other passes of
layers; head: of drafts and verification; overhead: the rest of a round, as accepting. without_x:
the speedup if x were free."""

_ROUND_LEGEND = """worth: steps of plain decoding a round does the work of. took: worth / speedup.
draft, verify, head: passes, as timed one by one; looks at exits are in head. overhead: the rest of
what it took, with the noise of the speedup. most_on: the largest of them."""


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "inference.tune",
        description="Find the fastest lossless strategy for a checkpoint on this machine, greedy,"
        " and keep it beside the checkpoint, where generate finds it; or the fastest threshold of a"
        " strategy that has one, which generate takes where it is given the strategy's name alone.",
        example="--run outputs/demo --max_d 6",
    )
    parser.add_argument(
        "--strategy",
        default=SelfSpeculative.name,
        help="self_speculative: it and dynamic are tried, with every E, d, stop and ngram; or one"
        " with a threshold, such as calm, and its other settings",
    )
    parser.add_argument(
        "--min_agreement",
        type=float,
        default=0.99,
        help="with a threshold: least share of tokens that the full model finds most probable",
    )
    parser.add_argument(
        "--thresholds",
        type=_numbers,
        default="0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,0.99",
        metavar="X,...",
        help="thresholds to try",
    )
    parser.add_argument("--max_d", type=int, default=6, help="most tokens drafted per round")
    parser.add_argument("--top", type=int, default=3, help="pairs of E and d to confirm")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts decoded at once")
    parser.add_argument("--repeats", type=int, default=3, help="times everything is measured")
    add_prompt_arguments(parser)
    add_compile_argument(parser)
    return parser


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, give numbers, as in 0.5,0.9") from None


def fastest(results: Sequence[ArmResult], min_agreement: float) -> ArmResult | None:
    """Return the fastest arm that keeps to the full model; None where that is autoregressive."""
    plain = AUTOREGRESSIVE.name
    fit = [r for r in results if r.full_choice >= min_agreement or r.strategy == plain]
    best = max(fit, key=lambda result: result.speedup)
    return None if best.strategy == plain else best


def cost_table(predictions: Sequence[Prediction], L: int) -> str:
    """Return, for each E, its best d and where the time of a round goes."""
    header = "E d agrees tokens/round draft verify head overhead speedup without_draft without_head"
    rows = []
    for E in range(1, L):
        p = next(p for p in predictions if p.E == E)  # the best first
        rows.append(
            [str(E), str(p.d), f"{p.agreement:.3f}", f"{p.tokens_per_round:.2f}"]
            + [f"{p.draft:.2f}", f"{p.verify:.2f}", f"{p.head:.2f}", f"{p.overhead:.2f}"]
            + [f"{p.speedup:.2f}x"]
            + [_speedup(p, p.round - p.draft), _speedup(p, p.round - p.head)]
        )
    return format_table(header.split(), rows)


def _speedup(p: Prediction, steps: float) -> str:
    """Return the speedup if a round took so many steps; "-" where a term alone takes longer."""
    return f"{p.tokens_per_round / steps:.2f}x" if steps > 0 else "-"


def round_cost_breakdown(result: ArmResult, costs: Costs) -> dict[str, float]:
    """Return where the time of a round goes that the arm's passes account for, in full steps."""
    L = len(costs.draft) + 1
    terms = {"draft": 0.0, "verify": 0.0, "head": 0.0}
    for start, stop, n, times in result.passes:
        term = "draft" if start == 0 and stop < L and n == 1 else "verify"
        terms[term] += times * costs.of_layers(start, stop, n)
    terms["head"] = sum(times * costs.of_head(n) for n, times in result.head_passes)
    return {term: steps / _rounds(result, L) for term, steps in terms.items()}


def _rounds(result: ArmResult, L: int) -> int:
    """Return the rounds of a batch: in each, the last layer is run once."""
    return sum(times for _, stop, _, times in result.passes if stop == L)


def round_terms(results: Sequence[ArmResult], costs: Costs) -> dict[str, dict[str, float]]:
    """Return, for each arm, what its rounds took and where that went; see the legend."""
    L, found = len(costs.draft) + 1, {}
    plain = next(result for result in results if result.strategy == AUTOREGRESSIVE.name)
    for r in results:
        worth = _rounds(plain, L) / _rounds(r, L)
        terms, took = round_cost_breakdown(r, costs), worth / r.speedup
        terms["overhead"] = took - sum(terms.values())
        found[r.settings] = {"worth": worth, "took": took, **terms}
    return found


def round_table(rounds: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of `round_terms`."""
    header, rows = "strategy worth took draft verify head overhead most_on", []
    for settings, row in rounds.items():
        terms = [name for name in row if name not in ("worth", "took")]
        largest = max(terms, key=lambda name: row[name])
        rows.append([settings, *(f"{value:.2f}" for value in row.values()), largest])
    return format_table(header.split(), rows)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What tuning leads to."""

    name: str | None
    """The strategy whose threshold was tuned; None: the fastest lossless one was looked for."""
    strategy: str | None
    """The best, as a user writes it; None: no threshold is of use."""
    verdict: str
    content: dict[str, Any]
    """What led to it."""


def tune(args: argparse.Namespace) -> None:
    """Run the command."""
    for name in ("max_d", "top", "repeats", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: {getattr(args, name)}, give at least 1")
    run = decoding_run_from(args)
    if run.model.config.n_layers < 2:
        raise ValueError(f"run: {run.checkpoint} has 1 layer, nothing can be left out")
    drafts = args.strategy == SelfSpeculative.name
    outcome = _tune_drafts(run, args) if drafts else _tune_threshold(run, args)
    conditions = conditions_of(run, batch_size=args.batch_size, quantize=args.quantize)
    tuned = Tuned(strategy=outcome.strategy, conditions=conditions)
    content = {"machine": machine(), **outcome.content}
    path = write_tuned(run, outcome.name, tuned, content)
    print(f"\n{outcome.verdict}; kept in {path}")
    write_json(args.json, asdict(tuned) | content)


def _tune_drafts(run: Run, args: argparse.Namespace) -> _Outcome:
    """Find the fastest lossless strategy."""
    check_draft_fits("max_d", args.max_d, run)
    workload = _workload(run, args)
    costs, predictions = _predict(run, workload, args.max_d)
    arms = candidates(predictions, costs, args.max_d, args.top)
    results = _measure(run, arms, workload, args.repeats)
    rounds = round_terms(results, costs)
    print(f"\nrounds, in full steps:\n{round_table(rounds)}\n\n{_ROUND_LEGEND}")
    best = max(results, key=lambda result: result.speedup)
    verdict = f"best: {best.settings}, {best.speedup:.2f}x"
    if best.strategy == AUTOREGRESSIVE.name:
        verdict = "nothing beats plain decoding here: see which term above eats the gain"
    content = {
        "costs": asdict(costs),
        "predictions": [asdict(p) | {"speedup": p.speedup} for p in predictions],
        "measured": [asdict(result) for result in results],
        "rounds": rounds,
    }
    return _Outcome(name=None, strategy=best.settings, verdict=verdict, content=content)


def _tune_threshold(run: Run, args: argparse.Namespace) -> _Outcome:
    """Find the fastest threshold that keeps to the full model."""
    arms = with_thresholds(args.strategy, args.thresholds, run.model.config.n_layers)
    results = _measure(run, arms, _workload(run, args), args.repeats)
    best, name, least = fastest(results, args.min_agreement), arms[-1].name, args.min_agreement
    if best is None:
        verdict = f"no threshold that agrees in {least:.1%} of the tokens beats plain decoding"
    else:
        verdict = f"best: {best.settings}, {best.speedup:.2f}x, taken by --strategy {name} alone"
    content = {"min_agreement": least, "measured": [asdict(result) for result in results]}
    strategy = None if best is None else best.settings
    return _Outcome(name=name, strategy=strategy, verdict=verdict, content=content)


def _workload(run: Run, args: argparse.Namespace) -> Workload:
    return Workload(
        prompts=prompts_from(run, args),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        sampling=Sampling(),
        seed=0,
    )


def _measure(
    run: Run, arms: Sequence[Strategy], workload: Workload, repeats: int
) -> list[ArmResult]:
    results = measure(
        run.model, arms, workload, repeats=repeats, report=report_line, graphs=run.graphs
    )
    print(f"\nmeasured:\n{table(results)}\n\n{LEGEND}")
    return results


def _predict(run: Run, workload: Workload, max_d: int) -> tuple[Costs, list[Prediction]]:
    """Measure costs and record exits; print what follows for every E."""
    model = run.model
    rows, traces = record_continuations(
        model,
        workload.prompts,
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
    )
    middle = [
        row[: min((len(row) + len(prompt)) // 2, model.config.max_seq_len - max_d - 1)]
        for row, prompt in zip(rows[: workload.batch_size], workload.prompts, strict=False)
    ]
    costs = measure_costs(model, middle, max_d, run.graphs)
    predictions = predict(traces, costs, max_d)
    print(f"{run.checkpoint}: a full step takes {costs.full_step_seconds * 1e3:.2f} ms")
    print(f"\npredicted:\n{cost_table(predictions, model.config.n_layers)}\n\n{_COST_LEGEND}")
    return costs, predictions


def main() -> None:
    """Enter from the command line."""
    run_command(build_parser(), tune)


if __name__ == "__main__":
    main()
