"""Strategies measured side by side: the same prompts, the same weights, interleaved in time."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from inference.engine.counters import Counters, DraftedRound, describe_drafts, speedup_bound
from inference.engine.cuda_graphs import RoundGraphs, graphed
from inference.engine.generation import Generation
from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.evaluation.arm_result import ArmResult
from inference.evaluation.likelihood import read_continuation
from inference.evaluation.peak_memory import peak_since, reset_peak_memory
from inference.evaluation.same_tokens import Difference, first_difference, same_share
from inference.evaluation.timing import TIMINGS, median_seconds
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.early_exit import EarlyExit
from inference.strategies.registry import describe
from inference.strategies.self_speculative import SelfSpeculative
from models.llama import NOTHING, Llama

AUTOREGRESSIVE: Strategy = Autoregressive()

Score = Callable[[list[list[int]]], Mapping[str, float]]
"""Rates the continuations of all prompts, by the names of the measures."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The prompts that every arm decodes, and how."""

    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int
    """Prompts decoded at once."""
    sampling: Sampling
    seed: int
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a continuation; the id itself is its last token."""


@dataclass(frozen=True)
class _Repeat:
    counters: Counters
    tokens: list[list[int]]
    drafts: list[Counter[DraftedRound]]
    peak_bytes: int | None

    @property
    def speed(self) -> float:
        """New tokens per second."""
        return self.counters.tokens_per_second

    def drafted(self) -> dict[str, Any]:
        """Return how the drafts of all prompts went."""
        past_end = {"drafted_past_end": self.counters.drafted_past_end}
        return describe_drafts(self.counters.drafts) | past_end

    def requests(self) -> list[dict[str, Any]]:
        """Return the new tokens of each prompt, and how its drafts went."""
        return [
            {"tokens": len(row)} | describe_drafts(drafts)
            for row, drafts in zip(self.tokens, self.drafts, strict=True)
        ]


def measure(
    model: Llama,
    arms: Sequence[Strategy],
    workload: Workload,
    *,
    repeats: int,
    report: Callable[[str], None],
    with_static: bool = False,
    score: Score | None = None,
    graphs: RoundGraphs | None = None,
    timings: int = TIMINGS,
) -> list[ArmResult]:
    """Decode the workload with every arm, `repeats` times, the arms taking turns.

    Args:
        model: In eval mode.
        arms: Strategies to compare, autoregressive decoding among them, E and d filled in.
        workload: What to decode.
        repeats: Number of times, at least 1.
        report: Called with a line of progress after every repeat.
        with_static: Measure early exit at the mean depth of every arm as well.
        score: Rates the continuations of an arm.
        graphs: Where rounds are kept as graphs, if they are to be any.
        timings: Times each kind of round is timed, for its costs.
    """
    arms, start = list(arms), time.perf_counter()
    # Warm-up: the first call of a shape is slow. A batch with spare slots serves all arms.
    slots = model.config.max_seq_len
    in_turn = sorted(arms, key=lambda arm: arm.spare_slots(slots), reverse=True)
    first = {arm: _decode(model, arm, workload, graphs) for arm in in_turn}
    if with_static:
        arms = [*dict.fromkeys([*arms, *_static_arms(first, model.config.n_layers)])]
        first = {arm: first.get(arm) or _decode(model, arm, workload, graphs) for arm in arms}
    report(f"warm-up: {time.perf_counter() - start:.1f} s")
    results: dict[Strategy, list[_Repeat]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms:
            results[arm].append(_decode(model, arm, workload, graphs))
        report(f"repeat {repeat + 1} of {repeats}: {time.perf_counter() - start:.1f} s")
    reference = results[AUTOREGRESSIVE]
    middle = [
        prompt + tokens[: len(tokens) // 2]
        for prompt, tokens in zip(workload.prompts, reference[0].tokens, strict=True)
    ]
    rows = middle[: workload.batch_size]
    seconds = _round_seconds(model, arms, rows, workload.sampling, graphs, timings)
    return [
        _summarise(arm, results[arm], reference, seconds, workload, model=model, score=score)
        for arm in arms
    ]


def _static_arms(decoded: Mapping[Strategy, "_Repeat"], n_layers: int) -> list[Strategy]:
    """Return early exit at the mean depth of every arm that saves layers, rounded.

    Where a strategy counts no depths, and drafts nothing, they are the layers per token.
    """
    found: list[Strategy] = []
    for repeat in decoded.values():
        counters = repeat.counters
        depth = counters.mean_depth
        if depth is None:
            depth = n_layers if counters.drafted else counters.layers_per_token
        if (E := max(1, round(depth))) < n_layers:
            found.append(EarlyExit(E=E))
    return found


def _decode(
    model: Llama, strategy: Strategy, workload: Workload, graphs: RoundGraphs | None
) -> _Repeat:
    device = model.norm.weight.device
    before = reset_peak_memory(device)
    generation = Generation(
        model,
        workload.prompts,
        strategy,
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
        stop_tokens=workload.stop_tokens,
        sampling=workload.sampling,
        seed=workload.seed,
        graphs=graphs,
    ).finish()
    peak = peak_since(before, device)
    if peak is not None and graphs is not None:
        peak += graphs.idle_bytes()
    return _Repeat(generation.counters, generation.tokens, generation.drafts, peak)


@torch.inference_mode()
def _round_seconds(
    model: Llama,
    arms: Sequence[Strategy],
    rows: list[list[int]],
    sampling: Sampling,
    graphs: RoundGraphs | None,
    timings: int,
) -> dict[Strategy, float]:
    """Time rounds of the arms that always draft d tokens with E layers, and what bounds them.

    That is full steps, and early exit at E, all on the same rows.
    """
    speculative = [arm for arm in arms if isinstance(arm, SelfSpeculative) and arm.always_drafts]
    steps = [EarlyExit(E=arm.E) for arm in speculative]
    configs: list[Strategy] = [*dict.fromkeys([AUTOREGRESSIVE, *speculative, *steps])]
    deepest = max((arm.d for arm in speculative), default=0)
    rows = [row[: model.config.max_seq_len - deepest - 1] for row in rows]
    slots = max(map(len, rows)) + deepest + 1
    state = allocate(model, len(rows), slots=slots, sampling=sampling, seed=0)
    prefill(state, rows, (model.config.n_layers, NOTHING))
    decoders = {config: config.start(state) for config in configs}
    if graphs is not None:
        recorder = graphs.new_recorder()
        decoders = {config: graphed(state, d, recorder) for config, d in decoders.items()}
    rounds = {config: partial(decoder, deepest + 1) for config, decoder in decoders.items()}
    return median_seconds(rounds, state.batch.device, timings)


def _summarise(
    arm: Strategy,
    repeats: list[_Repeat],
    reference: list[_Repeat],
    seconds: dict[Strategy, float],
    workload: Workload,
    *,
    model: Llama,
    score: Score | None,
) -> ArmResult:
    speedups = [a.speed / b.speed for a, b in zip(repeats, reference, strict=True)]
    speedup, speeds = statistics.median(speedups), [repeat.speed for repeat in repeats]
    counters, tokens = repeats[0].counters, repeats[0].tokens
    read = [read_continuation(model, *pair) for pair in zip(workload.prompts, tokens, strict=True)]
    same, difference = _compare(model, arm, workload, tokens, reference[0].tokens)
    draft_cost, verify_cost, bound = _costs_and_bound(arm, seconds, counters)
    return ArmResult(
        strategy=arm.name,
        settings=describe(arm),
        E=getattr(arm, "E", None),
        d=getattr(arm, "d", None),
        batch_size=workload.batch_size,
        tokens=counters.tokens,
        tokens_per_second=statistics.median(speeds),
        speedup=speedup,
        speeds=speeds,
        speedups=speedups,
        acceptance_rate=counters.acceptance_rate,
        tokens_per_verify=counters.tokens_per_round if counters.drafted else None,
        layers_per_token=counters.layers_per_token,
        heads_per_token=counters.heads_per_token,
        syncs_per_token=counters.syncs / counters.tokens,
        mean_depth=counters.mean_depth,
        prefill_seconds=statistics.median(r.counters.prefill_seconds for r in repeats),
        agreement=counters.agreement,
        draft_cost=draft_cost,
        verify_cost=verify_cost,
        bound=bound,
        share_of_bound=None if bound is None else speedup / bound,
        same_tokens=same,
        first_difference=difference,
        full_choice=sum(chosen for _, chosen in read) / counters.tokens,
        log_likelihood=sum(likelihood for likelihood, _ in read) / counters.tokens,
        scores=dict(score(tokens)) if score is not None else {},
        drafts=repeats[0].drafted(),
        requests=repeats[0].requests(),
        passes=[(*key, times) for key, times in sorted(counters.passes.items())],
        head_passes=sorted(counters.head_passes.items()),
        peak_bytes=max((r.peak_bytes for r in repeats if r.peak_bytes is not None), default=None),
    )


def _compare(
    model: Llama,
    arm: Strategy,
    workload: Workload,
    ours: list[list[int]],
    theirs: list[list[int]],
) -> tuple[float | None, Difference | None]:
    """Return the share of greedy tokens that are the base's, and of a lossless arm the cause."""
    if workload.sampling.temperature:
        return None, None
    cause = first_difference(model, workload.prompts, ours, theirs) if arm.lossless else None
    return same_share(ours, theirs), cause


def _costs_and_bound(
    arm: Strategy, seconds: dict[Strategy, float], counters: Counters
) -> tuple[float | None, float | None, float | None]:
    """Return c, the cost of a verification and the bound, where every round drafts d tokens."""
    if not isinstance(arm, SelfSpeculative) or not arm.always_drafts:
        return None, None, None
    full_step, draft_step = seconds[AUTOREGRESSIVE], seconds[EarlyExit(E=arm.E)]
    draft_cost = draft_step / full_step
    verify_cost = (seconds[arm] - arm.d * draft_step) / full_step
    bound = None
    if counters.agreement is not None:
        bound = speedup_bound(counters.agreement, arm.d, draft_cost)
    return draft_cost, verify_cost, bound
