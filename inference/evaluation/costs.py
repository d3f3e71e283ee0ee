"""Costs of passes and rounds on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inference.engine.cuda_graphs import RoundGraphs
from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from inference.evaluation.timing import TIMINGS, median_seconds
from inference.strategies.drafting import NgramDrafts
from inference.strategies.early_exit import EarlyExit
from inference.strategies.self_speculative import SelfSpeculative, accept_round, verify
from inference.strategies.tree import tree_shape
from models.llama import NOTHING, Llama


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of passes and rounds, in full steps of one token."""

    full_step_seconds: float
    draft: list[float]
    """c_E for E = 1, 2, ..., L - 1: a step of the first E layers, head included."""
    layers: list[float]
    """For n = 1, 2, ... tokens, a pass of all layers."""
    head: list[float]
    """For n = 1, 2, ... tokens, the final norm, head and choice."""
    many_heads: float
    """The same for the states that all exits but the last have of the most of these tokens."""
    rounds: list[tuple[float, float]]
    """For E = 1, 2, ..., L - 1, a round: for each drafted token, and beside them."""
    lookup: float
    """A round of n-gram drafts, as many tokens as are drafted at most, verified by all layers."""
    leaves: tuple[float, float]
    """What leaves add to a round: any at all, and each."""
    most_leaves: int
    """Of a round."""
    many_layers: float
    """A pass of all layers for these too, beside the most of the tokens of `layers`."""

    def of_layers(self, start: int, stop: int, n: int) -> float:
        """Return the cost of layers start, ..., stop - 1 for n tokens of each row.

        It is linear between the numbers of tokens that were timed.
        """
        L = len(self.draft) + 1
        if start == 0 and stop < L and n == 1:
            return max(0.0, self.draft[stop - 1] - self.head[0])
        most = len(self.layers)
        if n <= most:
            return (stop - start) / L * self.layers[n - 1]
        slope = (self.many_layers - self.layers[-1]) / max(1, self.most_leaves)
        return (stop - start) / L * (self.layers[-1] + (n - most) * slope)

    def of_head(self, n: int) -> float:
        """Return the cost of the head for n tokens of each row, linear between timed numbers."""
        most = len(self.head)
        if n <= most:
            return self.head[n - 1]
        beyond = (n - most) / (most * max(1, len(self.draft) - 1))
        return self.head[-1] + beyond * (self.many_heads - self.head[-1])

    def of_leaves(self, n: int) -> float:
        """Return what n leaves add to a round."""
        return self.leaves[0] + n * self.leaves[1] if n else 0.0

    def of_round(self, E: int, d: int, branch: int = 1) -> tuple[float, float, float, float]:
        """Return the cost of a round: of the layers that draft and verify, the head, and the rest.

        The pending token and the d drafted ones go through E layers one by one, the last of them
        with the leaves, then through the others and the head together. The rest is the time of
        whole rounds beyond these passes.
        """
        n = d * (branch - 1)
        draft = (d + (n == 0)) * self.of_layers(0, E, 1)
        verify = self.of_layers(E, len(self.draft) + 1, d + 1 + n)
        verify += self.of_layers(0, E, 1 + n) if n else 0.0
        head = d * self.of_head(1) + self.of_head(d + 1 + n)
        each, beside = self.rounds[E - 1]
        whole = beside + d * each + self.of_leaves(n)
        return draft, verify, head, whole - draft - verify - head


@torch.inference_mode()
def measure_costs(
    model: Llama,
    rows: Sequence[Sequence[int]],
    max_d: int,
    sampling: Sampling | None = None,
    *,
    branch: int = 1,
    graphs: RoundGraphs | None = None,
    timings: int = TIMINGS,
) -> Costs:
    """Time steps, passes and rounds after `rows`.

    Args:
        model: In eval mode.
        rows: Tokens of each row.
        max_d: Most tokens drafted in a round.
        sampling: Greedy if not given.
        branch: Most candidates for each.
        graphs: Where each is kept as a graph, if it is to be.
        timings: Times each is timed.
    """
    L, n_leaves = model.config.n_layers, max_d * (branch - 1)
    slots, sampling = max(map(len, rows)) + max_d + 1, sampling or Sampling()
    state = allocate(model, len(rows), slots=slots, sampling=sampling, seed=0, spare=n_leaves)
    prefill(state, rows, (L, NOTHING))
    passes = _passes(state, max_d, branch)
    if graphs is not None:
        recorder = graphs.new_recorder()
        for run in passes.values():
            run()
        passes = {key: recorder.record(run, state) for key, run in passes.items()}
    seconds = median_seconds(passes, state.batch.device, timings)
    full = seconds["step", L]
    steps = {key: time / full for key, time in seconds.items()}
    return Costs(
        full_step_seconds=full,
        draft=[steps["step", E] for E in range(1, L)],
        layers=[steps["layers", n] for n in range(1, max_d + 2)],
        head=[steps["head", n] for n in range(1, max_d + 2)],
        many_heads=steps["head", (L - 1) * (max_d + 1)],
        rounds=[
            _line(steps["round of one", E], steps["round", E], max_d, steps["step", E])
            for E in range(1, L)
        ],
        lookup=steps["lookup", max_d],
        leaves=_leaf_costs(steps, L, n_leaves),
        most_leaves=n_leaves,
        many_layers=steps["layers", max_d + 1 + n_leaves],
    )


def _passes(
    state: DecodeState, max_d: int, branch: int
) -> dict[tuple[str, int], Callable[[], object]]:
    """Return what is timed, by its name and size."""
    L, n_leaves = state.model.config.n_layers, max_d * (branch - 1)
    passes: dict[tuple[str, int], Callable[[], object]] = {}
    for E in range(1, L + 1):
        passes["step", E] = _step(state, E)
    for n in range(1, max_d + 2):
        passes["layers", n] = _layers(state, n)
        passes["head", n] = _head(state, n)
    for E in range(1, L):
        passes["round of one", E] = _round(state, E, 1)
        passes["round", E] = _round(state, E, max_d)
    passes["lookup", max_d] = _lookup(state, max_d)
    passes["head", (L - 1) * (max_d + 1)] = _head(state, (L - 1) * (max_d + 1))
    if n_leaves:
        passes["layers", max_d + 1 + n_leaves] = _tree_layers(state, max_d, branch)
        passes["round with a leaf", L // 2] = _round(state, L // 2, 1, 2)
        passes["round with leaves", L // 2] = _round(state, L // 2, max_d, branch)
    return passes


def _leaf_costs(steps: dict[tuple[str, int], float], L: int, n: int) -> tuple[float, float]:
    """Return what leaves add to a round, any at all and each of up to n, drafted by L / 2 layers.

    All run through all layers, whichever exit drafts.
    """
    if not n:
        return 0.0, 0.0
    one = steps["round with a leaf", L // 2] - steps["round of one", L // 2]
    most = steps["round with leaves", L // 2] - steps["round", L // 2]
    each = max(0.0, (most - one) / (n - 1)) if n > 1 else 0.0
    return max(0.0, one - each), each


def _line(one: float, most: float, max_d: int, step: float) -> tuple[float, float]:
    """Return the cost of a round for each drafted token, and beside them.

    Args:
        one: A round of one drafted token.
        most: One of max_d.
        max_d: The most.
        step: A step of the layers that draft, where max_d is 1.
    """
    each = (most - one) / (max_d - 1) if max_d > 1 else step
    return each, one - each


def _step(state: DecodeState, E: int) -> Callable[[], object]:
    decoder = EarlyExit(E=E).start(state)
    return lambda: decoder(1)


def _round(state: DecodeState, E: int, d: int, branch: int = 1) -> Callable[[], object]:
    decoder = SelfSpeculative(E=E, d=d, branch=branch).start(state)
    return lambda: decoder(d + 1)


def _lookup(state: DecodeState, d: int) -> Callable[[], object]:
    tokens = state.batch.pending[:, None].expand(-1, d).contiguous()
    vocab_size, greedy = state.model.config.vocab_size, state.generator is None
    drafted = NgramDrafts(tokens, ~state.batch.finished, vocab_size, greedy).as_draft()
    return lambda: accept_round(state, drafted, verify(state, 0, drafted))


def _layers(state: DecodeState, n: int) -> Callable[[], object]:
    tokens, L = state.batch.pending[:, None].expand(-1, n), state.model.config.n_layers
    return lambda: state.run(state.model.embed(tokens), 0, L)


def _tree_layers(state: DecodeState, d: int, branch: int) -> Callable[[], object]:
    """Return a pass over the pending token, d drafted ones and their leaves.

    A row has room for d + 1 positions, and leaves take none of their own.
    """
    shape, L = tree_shape(d, branch, state.batch.device), state.model.config.n_layers
    tokens = state.batch.pending[:, None].expand(-1, len(shape.depths))
    return lambda: state.run_tree(state.model.embed(tokens), 0, L, state.open_tree(shape))


def _head(state: DecodeState, n: int) -> Callable[[], object]:
    h = state.model.embed(state.batch.pending[:, None].expand(-1, n))
    return lambda: state.distribution(h).argmax(-1)
