"""What passes cost on this machine, and the speedups that follow for every E and d."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.autoregressive import EarlyExit
from inference.decode import wait_for
from inference.graphs import RoundGraphs
from inference.rows import fill_rows, open_state
from inference.sampling import Sampling
from inference.state import DecodeState
from models.llama import NOTHING, Llama

_TIMINGS = 30


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

    def verify(self, E: int, d: int) -> float:
        """Return v_{E,d}: the last draft through E layers, d + 1 tokens through the others."""
        share = E / (len(self.draft) + 1)
        return share * self.layers[0] + (1 - share) * self.layers[d] + self.head[d]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What E and d promise; costs of a round are in full steps."""

    E: int
    d: int
    agreement: float
    """a_E: how often the exit says what the last layer says."""
    tokens_per_round: float
    draft: float
    """Spent on the layers that draft."""
    verify: float
    """Spent on the layers that verify."""
    head: float
    """Spent on the head, for drafts and verification."""

    @property
    def round(self) -> float:
        """Full steps of a round."""
        return self.draft + self.verify + self.head

    @property
    def speedup(self) -> float:
        """tokens_per_round / round."""
        return self.tokens_per_round / self.round


@torch.inference_mode()
def measure_costs(
    model: Llama, rows: Sequence[Sequence[int]], max_d: int, graphs: RoundGraphs | None = None
) -> Costs:
    """Time steps and passes after `rows`, taking turns; medians. With `graphs`, each is one."""
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
    if graphs is not None:
        recorder = graphs.new_recorder()
        for run in passes.values():
            run()
        passes = {key: recorder.record(run, state) for key, run in passes.items()}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
    for _ in range(_TIMINGS):
        for key, run in passes.items():
            start = time.perf_counter()
            run()
            wait_for(state.pending.device)
            seconds[key].append(time.perf_counter() - start)
    full = statistics.median(seconds["step", L])
    steps = {key: statistics.median(times) / full for key, times in seconds.items()}
    return Costs(
        full_step_seconds=full,
        draft=[steps["step", E] for E in range(1, L)],
        layers=[steps["layers", n] for n in range(1, max_d + 2)],
        head=[steps["head", n] for n in range(1, max_d + 2)],
    )


def _step(state: DecodeState, E: int) -> Callable[[], object]:
    decoder = EarlyExit(E=E).start(state)
    return lambda: decoder(1)


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

    speedup = tokens_per_round / (d c_E + v_{E,d})
    """
    said = torch.cat(list(traces), dim=1)
    found = []
    for E, c in enumerate(costs.draft, start=1):
        for d in range(1, max_d + 1):
            one_head = min(costs.head[0], c)
            found.append(
                Prediction(
                    E=E,
                    d=d,
                    agreement=float((said[E - 1] == said[-1]).float().mean()),
                    tokens_per_round=tokens_per_round(traces, E, d),
                    draft=d * (c - one_head),
                    verify=costs.verify(E, d) - costs.head[d],
                    head=d * one_head + costs.head[d],
                )
            )
    return sorted(found, key=lambda prediction: -prediction.speedup)
