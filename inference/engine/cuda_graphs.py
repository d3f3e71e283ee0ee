"""Rounds as graphs: what the device was told once is told again in one call.

A round of a `GraphableDecoder` has a graph for its number of tokens and the longest row it is for,
rounded up, so that a generation needs few. Counts and lengths that the host keeps move with each
replay as they did when the graph was recorded. Knows no strategy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Protocol, TypeVar

import torch

from inference.engine.batch import Round
from inference.engine.compiled import WINDOW_STEP
from inference.engine.counters import Counters
from inference.engine.decoder import Decoder, GraphableDecoder, advancing
from inference.engine.prefill import allocate, reset
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from models.llama import Llama

T = TypeVar("T")


class Recorder(Protocol):
    """Keeps what a device is told."""

    def record(self, run: Callable[[], T], state: DecodeState) -> Callable[[], T]:
        """Return a function that does to tensors what `run` does, and nothing else `run` does.

        `run` is called once, and changes no tensor then; it must have been called before, as what
        comes first may compile or allocate. Every call of the function returns the same tensors,
        written anew. `state` is what `run` works on; its generator draws on.
        """
        ...

    def idle_bytes(self) -> int:
        """Return what is held for the records but not counted as allocated."""
        ...


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        """Record nothing yet. A recorder's graphs must all be kept until its last `record`."""
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], T], state: DecodeState) -> Callable[[], T]:
        """Capture `run`; see `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        if state.generator is not None:
            graph.register_generator_state(state.generator)
        stream = _capture_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.graph(graph, self._pool, stream):
            result = run()

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def idle_bytes(self) -> int:
        """Return the bytes of the graphs' pool that no tensor has; see `Recorder`."""
        return sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self._pool)
        )


@cache  # as cuBLAS keeps a workspace for every stream
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], Round]
    counters: Counters
    max_position: int
    """How far it moves the state's `max_position`."""


class GraphedRounds:
    """A decoder that runs the first round of a kind as it is, and replays a graph for the others.

    Args:
        state: The batch.
        rounds: How to decode.
        recorder: Of the graphs.
    """

    def __init__(self, state: DecodeState, rounds: GraphableDecoder, recorder: Recorder) -> None:
        """Record nothing yet; see the class."""
        self._state, self._rounds, self._recorder = state, rounds, recorder
        self._graphs: dict[tuple[int, int], _Graph | None] = {}
        """By tokens of a round and `max_position` at its begin; None: such a round was run once."""

    def __call__(self, max_tokens: int) -> Round:
        """Run a round."""
        state, n = self._state, min(max_tokens, self._rounds.max_tokens)
        self._rounds.prepare(n)
        beyond = self._rounded_up(n) - state.batch.max_position
        state.batch.max_position += beyond
        key = n, state.batch.max_position
        if key in self._graphs:
            graph = self._graphs[key] or self._record(n)
            self._graphs[key] = graph
            result = graph.replay()
            state.counters += graph.counters
            state.batch.max_position += graph.max_position
        else:
            syncs = state.counters.syncs
            result = self._rounds.run(n)
            assert state.counters.syncs == syncs, "graphable rounds may not sync with the host"
            self._graphs[key] = None
        state.batch.max_position -= beyond
        return result

    def _rounded_up(self, n: int) -> int:
        """Return a `max_position` such that n more slots end a window; it bounds the true one."""
        slots = -(-(self._state.batch.max_position + n) // WINDOW_STEP) * WINDOW_STEP
        return min(slots, self._state.cache.slots) - n

    def _record(self, n: int) -> _Graph:
        state = self._state
        counters, max_position = state.counters, state.batch.max_position
        state.counters = Counters()
        replay = self._recorder.record(partial(self._rounds.run, n), state)
        graph = _Graph(replay, state.counters, state.batch.max_position - max_position)
        state.counters, state.batch.max_position = counters, max_position
        return graph


def graphed(state: DecodeState, decoder: Decoder, recorder: Recorder) -> Decoder:
    """Return a decoder that uses graphs, if its rounds can be any."""
    return (
        GraphedRounds(state, decoder, recorder)
        if isinstance(decoder, GraphableDecoder)
        else decoder
    )


@dataclass
class GraphedBatch:
    """A batch that one generation after another works on, and the graphs on its tensors."""

    state: DecodeState
    recorder: Recorder
    _decoders: dict[Strategy, Decoder] = field(default_factory=dict)

    def start(self, strategy: Strategy) -> Decoder:
        """Begin to decode, with the graphs there are; the decoder advances the state as well."""
        if strategy in self._decoders:
            return self._decoders[strategy]
        plain = advancing(self.state.batch, strategy.start(self.state))
        decoder = graphed(self.state, plain, self.recorder)
        if decoder is not plain:
            self._decoders[strategy] = decoder
        return decoder


class RoundGraphs:
    """Graphs kept from one generation to the next, as long as batches have the same shape.

    Args:
        new_recorder: Gives a recorder for the graphs of one batch.
    """

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        """Keep nothing yet; see the class."""
        self.new_recorder = new_recorder
        self._kept: GraphedBatch | None = None

    def take(
        self, model: Llama, rows: int, *, slots: int, sampling: Sampling, seed: int
    ) -> GraphedBatch:
        """Return a batch as `allocate` lays it out, for one generation alone."""
        batch, self._kept = self._kept, None
        if batch is not None:
            state = batch.state
            shape = len(state.batch.positions), state.cache.slots, state.sampling
            if state.model is model and shape == (rows, slots, sampling):
                reset(state, seed)
                return batch
        state = allocate(model, rows, slots=slots, sampling=sampling, seed=seed)
        return GraphedBatch(state, self.new_recorder())

    def give_back(self, batch: GraphedBatch) -> None:
        """Keep a batch whose generation has ended, in place of any other."""
        self._kept = batch

    def idle_bytes(self) -> int:
        """Return what the graphs of the batch that is kept hold; see `Recorder`."""
        return 0 if self._kept is None else self._kept.recorder.idle_bytes()


def round_graphs(device: torch.device) -> RoundGraphs | None:
    """Return graphs, where the device has any."""
    return RoundGraphs(partial(CudaRecorder, device)) if device.type == "cuda" else None
