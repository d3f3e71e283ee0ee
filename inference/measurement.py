"""Strategies measured side by side: the same prompts, the same weights, interleaved in time."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inference.autoregressive import Autoregressive, EarlyExit
from inference.counters import Counters, speedup_bound
from inference.decode import Generation, wait_for
from inference.rows import fill_rows, open_state
from inference.sampling import Sampling
from inference.self_speculative import SelfSpeculative
from inference.state import Strategy
from inference.strategies import describe
from models.llama import NOTHING, Llama

_TIMINGS = 12
_ROUNDS_PER_TIMING = 4

AUTOREGRESSIVE: Strategy = Autoregressive()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every arm decodes."""

    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int
    """Prompts decoded at once."""
    sampling: Sampling
    seed: int


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One strategy's measurements; medians over repeats where time is involved."""

    strategy: str
    settings: str
    """The strategy as a user writes it."""
    E: int | None
    """Layers run before the exit."""
    d: int | None
    """Tokens drafted per round."""
    tokens_per_second: float
    """New tokens per second of decoding, prompts not counted, all rows of a batch together."""
    speedup: float
    """Median over repeats of this arm's tokens/s over autoregressive's in the same repeat."""
    acceptance_rate: float | None
    """Accepted over drafted tokens."""
    tokens_per_verify: float | None
    """New tokens per round, where anything is drafted."""
    layers_per_token: float
    heads_per_token: float
    syncs_per_token: float
    """Times the host waited inside a round."""
    mean_depth: float | None
    """Layers behind a new token, where a strategy may take fewer than all."""
    prefill_seconds: float
    """Of all prompts together."""
    agreement: float | None
    """a: see `Counters.agreement`."""
    draft_cost: float | None
    """c: seconds of one draft step over seconds of one full step."""
    verify_cost: float | None
    """Seconds of one verification over seconds of one full step; the bound takes it as 1."""
    bound: float | None
    """The best speedup for this a, d and c: see `speedup_bound`."""
    share_of_bound: float | None
    """speedup / bound."""
    same_tokens: float | None
    """Share of tokens equal to autoregressive's, place by place; None when sampling."""


@dataclass(frozen=True)
class _Repeat:
    counters: Counters
    tokens: list[list[int]]


def measure(
    model: Llama,
    arms: Sequence[Strategy],
    workload: Workload,
    *,
    repeats: int,
    report: Callable[[str], None],
) -> list[ArmResult]:
    """Decode the workload with every arm, `repeats` times, the arms taking turns.

    Rows never stop early, so every arm decodes the same number of tokens.

    Args:
        model: In eval mode.
        arms: Strategies to compare, autoregressive decoding among them, E and d filled in.
        workload: What to decode.
        repeats: Number of times, at least 1.
        report: Called with a line of progress after every repeat.
    """
    for arm in arms:  # Warm-up: the first call of a shape is slow.
        _decode(model, arm, workload, workload.prompts[: workload.batch_size])
    results: dict[Strategy, list[_Repeat]] = {arm: [] for arm in arms}
    start = time.perf_counter()
    for repeat in range(repeats):
        for arm in arms:
            results[arm].append(_decode(model, arm, workload, workload.prompts))
        report(f"repeat {repeat + 1} of {repeats}: {time.perf_counter() - start:.1f} s")
    reference = results[AUTOREGRESSIVE]
    middle = [
        prompt + tokens[: workload.max_new_tokens // 2]
        for prompt, tokens in zip(workload.prompts, reference[0].tokens, strict=True)
    ]
    seconds = _round_seconds(model, arms, middle[: workload.batch_size], workload.sampling)
    return [_summarise(arm, results[arm], reference, seconds, workload) for arm in arms]


def _decode(
    model: Llama, strategy: Strategy, workload: Workload, prompts: list[list[int]]
) -> _Repeat:
    generation = Generation(
        model,
        prompts,
        strategy,
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
        sampling=workload.sampling,
        seed=workload.seed,
    ).finish()
    return _Repeat(generation.counters, generation.tokens)


@torch.inference_mode()
def _round_seconds(
    model: Llama, arms: Sequence[Strategy], rows: list[list[int]], sampling: Sampling
) -> dict[Strategy, float]:
    """Time one round of every arm, and of early exit at every E that drafts, on the same rows.

    A few rounds of an arm are timed together: a draft step that follows another finds its weights
    in the processor's cache.
    """
    speculative = [arm for arm in arms if isinstance(arm, SelfSpeculative) and arm.always_drafts]
    configs = [*dict.fromkeys([*arms, *(EarlyExit(E=arm.E) for arm in speculative)])]
    deepest = max((arm.d for arm in speculative), default=0)
    rows = [row[: model.config.max_seq_len - deepest - 1] for row in rows]
    slots = max(map(len, rows)) + deepest + 1
    state = open_state(model, len(rows), slots=slots, sampling=sampling, seed=0)
    fill_rows(state, rows, (model.config.n_layers, NOTHING))
    decoders = {config: config.start(state) for config in configs}
    samples: dict[Strategy, list[float]] = {config: [] for config in configs}
    for _ in range(_TIMINGS):
        for config, decoder in decoders.items():
            start = time.perf_counter()
            for _ in range(_ROUNDS_PER_TIMING):
                decoder(deepest + 1)
            wait_for(state.pending.device)
            samples[config].append((time.perf_counter() - start) / _ROUNDS_PER_TIMING)
    return {config: statistics.median(times) for config, times in samples.items()}


def _summarise(
    arm: Strategy,
    repeats: list[_Repeat],
    reference: list[_Repeat],
    seconds: dict[Strategy, float],
    workload: Workload,
) -> ArmResult:
    speeds = [repeat.counters.tokens_per_second for repeat in repeats]
    baseline = [repeat.counters.tokens_per_second for repeat in reference]
    speedup = statistics.median(a / b for a, b in zip(speeds, baseline, strict=True))
    counters = repeats[0].counters
    draft_cost = verify_cost = bound = None
    if isinstance(arm, SelfSpeculative) and arm.always_drafts:
        full_step = seconds[AUTOREGRESSIVE]
        draft_step = seconds[EarlyExit(E=arm.E)]
        draft_cost = draft_step / full_step
        verify_cost = (seconds[arm] - arm.d * draft_step) / full_step
        if counters.agreement is not None:
            bound = speedup_bound(counters.agreement, arm.d, draft_cost)
    return ArmResult(
        strategy=arm.name,
        settings=describe(arm),
        E=getattr(arm, "E", None),
        d=getattr(arm, "d", None),
        tokens_per_second=statistics.median(speeds),
        speedup=speedup,
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
        same_tokens=(
            _same_share(repeats[0].tokens, reference[0].tokens)
            if workload.sampling.temperature == 0.0
            else None
        ),
    )


def _same_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)
