"""Costs of passes and rounds on this machine, and the speedups that follow for every E and d."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.cuda_graphs import RoundGraphs
from inference.engine.prefill import allocate, prefill
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from inference.evaluation.timing import TIMINGS, median_seconds
from inference.strategies.drafting import NgramDrafts
from inference.strategies.early_exit import EarlyExit
from inference.strategies.self_speculative import SelfSpeculative, accept_round, verify
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

    def of_layers(self, start: int, stop: int, n: int) -> float:
        """Return the cost of layers start, ..., stop - 1 for n tokens of each row."""
        L = len(self.draft) + 1
        if start == 0 and stop < L and n == 1:
            return max(0.0, self.draft[stop - 1] - self.head[0])
        return (stop - start) / L * self.layers[n - 1]

    def of_head(self, n: int) -> float:
        """Return the cost of the head for n tokens of each row, linear between timed numbers."""
        most = len(self.head)
        if n <= most:
            return self.head[n - 1]
        beyond = (n - most) / (most * max(1, len(self.draft) - 1))
        return self.head[-1] + beyond * (self.many_heads - self.head[-1])

    def of_round(self, E: int, d: int) -> tuple[float, float, float, float]:
        """Return the cost of a round: of the layers that draft and verify, the head, and the rest.

        The pending token and the d drafted ones go through E layers one by one, then through the
        others and the head together. The rest is the time of whole rounds beyond these passes.
        """
        draft = (d + 1) * self.of_layers(0, E, 1)
        verify = self.of_layers(E, len(self.draft) + 1, d + 1)
        head = d * self.of_head(1) + self.of_head(d + 1)
        each, beside = self.rounds[E - 1]
        return draft, verify, head, beside + d * each - draft - verify - head


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The speedup predicted for E and d; costs of a round are in full steps."""

    E: int
    d: int
    agreement: float
    """a_E: mean chance that a token drafted after those before it in the text is accepted; greedy,
    the share of tokens where the exit predicts the last layer's token. Beside it, `Counters`
    counts the drafted tokens alone."""
    tokens_per_round: float
    draft: float
    """Spent on single tokens in the layers that draft, the pending and all drafted ones."""
    verify: float
    """Spent on the layers that verify."""
    head: float
    """Spent on the head, for drafts and verification."""
    overhead: float
    """Spent on the rest: accepting drafts and putting tensors together, less the time that passes
    save in a round over passes alone."""

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
    model: Llama,
    rows: Sequence[Sequence[int]],
    max_d: int,
    sampling: Sampling | None = None,
    *,
    graphs: RoundGraphs | None = None,
    timings: int = TIMINGS,
) -> Costs:
    """Time steps, passes and rounds after `rows`; with `graphs`, each as a graph."""
    L = model.config.n_layers
    slots = max(map(len, rows)) + max_d + 1
    state = allocate(model, len(rows), slots=slots, sampling=sampling or Sampling(), seed=0)
    prefill(state, rows, (L, NOTHING))
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
    )


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


def _round(state: DecodeState, E: int, d: int) -> Callable[[], object]:
    decoder = SelfSpeculative(E=E, d=d).start(state)
    return lambda: decoder(d + 1)


def _lookup(state: DecodeState, d: int) -> Callable[[], object]:
    tokens = state.batch.pending[:, None].expand(-1, d).contiguous()
    vocab_size, greedy = state.model.config.vocab_size, state.generator is None
    drafted = NgramDrafts(tokens, ~state.batch.finished, vocab_size, greedy).as_draft()
    return lambda: accept_round(state, drafted, verify(state, 0, drafted))


def _layers(state: DecodeState, n: int) -> Callable[[], object]:
    tokens, L = state.batch.pending[:, None].expand(-1, n), state.model.config.n_layers
    return lambda: state.run(state.model.embed(tokens), 0, L)


def _head(state: DecodeState, n: int) -> Callable[[], object]:
    h = state.model.embed(state.batch.pending[:, None].expand(-1, n))
    return lambda: state.distribution(h).argmax(-1)


def tokens_per_round(chances: Sequence[Tensor], E: int, d: int) -> float:
    """Return the tokens per round of E and d along recorded continuations.

    Greedy drafts that are accepted are the continuation itself, so this is exact; of sampled ones
    it is the mean, as if drafts followed the continuation. The n of n + 1 tokens accepted by chance
    a each, 1 + a + ... + a^d in all (Leviathan et al., arXiv 2211.17192, eq. 1), are so only where
    agreement does not come in streaks.

    Args:
        chances: Of each continuation, the chance that a token drafted by each exit is accepted,
            (L, tokens), row E - 1 the exit after E, see `record_acceptance`.
        E: Layers that draft.
        d: Tokens drafted.
    """
    return sum(chance.shape[1] for chance in chances) / sum(
        _expected_rounds(chance[E - 1].tolist(), d) for chance in chances
    )


def _expected_rounds(chance: list[float], d: int) -> float:
    """Return the rounds that d drafts each take, from the chance of each token to be accepted."""
    tokens = len(chance)
    left = [0.0] * (tokens + 1)
    """Rounds that the tokens from each position on take."""
    for position in reversed(range(tokens)):
        drafted, reached = min(d, tokens - position - 1), 1.0
        left[position] = 1.0
        for i in range(position, position + drafted):
            left[position] += reached * (1.0 - chance[i]) * left[i + 1]
            reached *= chance[i]
        left[position] += reached * left[position + drafted + 1]
    return left[0]


def predict(chances: Sequence[Tensor], costs: Costs, max_d: int) -> list[Prediction]:
    """Return the prediction for every E and every d up to `max_d`, the best first.

    speedup = tokens_per_round / (d c_E + v_E), by the costs of whole rounds.
    """
    agreement, L = torch.cat(list(chances), dim=1).mean(1).tolist(), len(costs.draft) + 1
    found = []
    for E in range(1, L):
        for d in range(1, max_d + 1):
            draft, verify, head, overhead = costs.of_round(E, d)
            found.append(
                Prediction(
                    E=E,
                    d=d,
                    agreement=agreement[E - 1],
                    tokens_per_round=tokens_per_round(chances, E, d),
                    draft=draft,
                    verify=verify,
                    head=head,
                    overhead=overhead,
                )
            )
    return sorted(found, key=lambda prediction: -prediction.speedup)
