"""What passes cost on this machine, and the speedups that follow for every E and d."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference.autoregressive import EarlyExit
from inference.decode import wait_for
from inference.graphs import RoundGraphs
from inference.rows import fill_rows, open_state
from inference.sampling import Sampling
from inference.self_speculative import SelfSpeculative
from inference.state import DecodeState
from models.llama import NOTHING, Llama

_TIMINGS = 12
_PASSES_PER_TIMING = 4


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What passes cost, in full steps of one token."""

    full_step_seconds: float
    draft: list[float]
    """c_E for E = 1, 2, ..., L - 1: a step of the first E layers, head included."""
    layers: list[float]
    """For n = 1, 2, ... tokens, a pass of all layers."""
    head: list[float]
    """For n = 1, 2, ... tokens, the final norm, head and choice."""
    many_heads: float
    """The same for what all exits but the last give for the most of these tokens."""
    overhead: float
    """What a round of drafts takes beyond these: to accept them, and to put tensors together."""

    @property
    def fixed_cost(self) -> float:
        """What a step costs besides its layers, in layers: b of c_E = (E + b) / (L + b).

        By least squares, each E's distance from the line E - c_E L = b (c_E - 1).
        """
        L = len(self.draft) + 1
        steps = [(E - c * L, c - 1) for E, c in enumerate(self.draft, start=1)]
        return max(0.0, sum(y * x for y, x in steps) / sum(x * x for _, x in steps))

    @property
    def verify_cost(self) -> float:
        """Several tokens through all layers and the head: the mean over how many."""
        passes = zip(self.layers[1:], self.head[1:], strict=True)
        return statistics.mean(layers + head for layers, head in passes)

    def of_layers(self, start: int, stop: int, n: int) -> float:
        """Return what layers start, ..., stop - 1 cost for n tokens of each row."""
        L = len(self.draft) + 1
        if start == 0 and stop < L and n == 1:
            return max(0.0, self.draft[stop - 1] - self.head[0])
        return (stop - start) / L * self.layers[n - 1]

    def of_head(self, n: int) -> float:
        """Return what the head costs for n tokens of each row; between what was timed, linear."""
        most = len(self.head)
        if n <= most:
            return self.head[n - 1]
        beyond = (n - most) / (most * max(1, len(self.draft) - 1))
        return self.head[-1] + beyond * (self.many_heads - self.head[-1])

    def of_round(self, E: int, d: int) -> tuple[float, float, float]:
        """Return what the passes of a round cost: the layers that draft and verify, and the head.

        The pending token and the d drafted ones go through E layers one by one, then through the
        others and the head together.
        """
        draft = (d + 1) * self.of_layers(0, E, 1)
        verify = self.of_layers(E, len(self.draft) + 1, d + 1)
        return draft, verify, d * self.of_head(1) + self.of_head(d + 1)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What E and d promise; costs of a round are in full steps."""

    E: int
    d: int
    agreement: float
    """a_E: how often the exit says what the last layer says."""
    tokens_per_round: float
    draft: float
    """Spent on single tokens in the layers that draft, the pending and all drafted ones."""
    verify: float
    """Spent on the layers that verify."""
    head: float
    """Spent on the head, for drafts and verification."""
    overhead: float
    """Spent on the rest."""

    @property
    def round(self) -> float:
        """Full steps of a round."""
        return self.draft + self.verify + self.head + self.overhead

    @property
    def speedup(self) -> float:
        """tokens_per_round / round."""
        return self.tokens_per_round / self.round


@torch.inference_mode()
def measure_costs(
    model: Llama, rows: Sequence[Sequence[int]], max_d: int, graphs: RoundGraphs | None = None
) -> Costs:
    """Time steps, passes and rounds after `rows`; medians. With `graphs`, each is one.

    They take turns, a few of a kind together: in decoding, too, like follows like.
    """
    L = model.config.n_layers
    slots = max(map(len, rows)) + max_d + 1
    state = open_state(model, len(rows), slots=slots, sampling=Sampling(), seed=0)
    fill_rows(state, rows, (L, NOTHING))
    passes: dict[tuple[str, int], Callable[[], object]] = {}
    for E in range(1, L + 1):
        passes["step", E] = _step(state, E)
    for n in range(1, max_d + 2):
        passes["layers", n] = _layers(state, n)
        passes["head", n] = _head(state, n)
    for E in range(1, L):
        passes["round", E] = _round(state, E)
    passes["head", (L - 1) * (max_d + 1)] = _head(state, (L - 1) * (max_d + 1))
    if graphs is not None:
        recorder = graphs.new_recorder()
        for run in passes.values():
            run()
        passes = {key: recorder.record(run, state) for key, run in passes.items()}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
    for _ in range(_TIMINGS):
        for key, run in passes.items():
            start = time.perf_counter()
            for _ in range(_PASSES_PER_TIMING):
                run()
            wait_for(state.pending.device)
            seconds[key].append((time.perf_counter() - start) / _PASSES_PER_TIMING)
    full = statistics.median(seconds["step", L])
    steps = {key: statistics.median(times) / full for key, times in seconds.items()}
    costs = Costs(
        full_step_seconds=full,
        draft=[steps["step", E] for E in range(1, L)],
        layers=[steps["layers", n] for n in range(1, max_d + 2)],
        head=[steps["head", n] for n in range(1, max_d + 2)],
        many_heads=steps["head", (L - 1) * (max_d + 1)],
        overhead=0.0,
    )
    beyond = [steps["round", E] - sum(costs.of_round(E, 1)) for E in range(1, L)]
    return replace(costs, overhead=statistics.median(beyond))


def _step(state: DecodeState, E: int) -> Callable[[], object]:
    decoder = EarlyExit(E=E).start(state)
    return lambda: decoder(1)


def _round(state: DecodeState, E: int) -> Callable[[], object]:
    decoder = SelfSpeculative(E=E, d=1).start(state)
    return lambda: decoder(2)


def _layers(state: DecodeState, n: int) -> Callable[[], object]:
    tokens, L = state.pending[:, None].expand(-1, n), state.model.config.n_layers
    return lambda: state.run(state.model.embed(tokens), 0, L)


def _head(state: DecodeState, n: int) -> Callable[[], object]:
    h = state.model.embed(state.pending[:, None].expand(-1, n))
    return lambda: state.distribution(h).argmax(-1)


def tokens_per_round(traces: Sequence[Tensor], E: int, d: int) -> float:
    """Return how many tokens a round of E and d gives along recorded greedy continuations.

    Exact, as greedy drafts that are accepted are the continuation itself; the n of n + 1 tokens
    accepted by chance a each, 1 + a + ... + a^d in all (Leviathan et al., arXiv 2211.17192, eq. 1),
    is so only where agreement does not come in streaks.

    Args:
        traces: What every exit says, each (L, tokens) int64, row l the exit after E = l + 1 layers.
        E: Layers that draft.
        d: Tokens drafted.
    """
    rounds = 0
    for trace in traces:
        right, place = (trace[E - 1] == trace[-1]).tolist(), 0
        while place < len(right):
            drafted = right[place : place + min(d, len(right) - place - 1)]
            place += 1 + (drafted.index(False) if False in drafted else len(drafted))
            rounds += 1
    return sum(trace.shape[1] for trace in traces) / rounds


def predict(traces: Sequence[Tensor], costs: Costs, max_d: int) -> list[Prediction]:
    """Return what every E and d up to `max_d` promise, the best first.

    speedup = tokens_per_round / (d c_E + v_{E,d}), where v_{E,d} is all that is not drafting.
    """
    said, L = torch.cat(list(traces), dim=1), len(costs.draft) + 1
    found = []
    for E in range(1, L):
        for d in range(1, max_d + 1):
            draft, verify, head = costs.of_round(E, d)
            found.append(
                Prediction(
                    E=E,
                    d=d,
                    agreement=float((said[E - 1] == said[-1]).float().mean()),
                    tokens_per_round=tokens_per_round(traces, E, d),
                    draft=draft,
                    verify=verify,
                    head=head,
                    overhead=costs.overhead,
                )
            )
    return sorted(found, key=lambda prediction: -prediction.speedup)
