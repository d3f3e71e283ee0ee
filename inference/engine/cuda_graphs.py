"""Captures decoding rounds as CUDA graphs and replays them: one launch for a whole round.

A round of a `GraphableDecoder` has one graph for each number of tokens and each window of the KV
cache, which is rounded up so that a generation needs few. A replay adds to the host's counters and
lengths what the captured round added. Imports no strategy.
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
    """Captures functions as graphs."""

    def record(self, run: Callable[[], T], state: DecodeState) -> Callable[[], T]:
        """Return a function that replays the kernels of `run`, and nothing it does on the host.

        `run` is called once, and no tensor changes then; it must have been called before, as its
        first call may compile or allocate. Every replay returns the same tensors, overwritten.

        Args:
            run: The function to capture.
            state: What it works on; replays draw on from the state's generator.
        """
        ...

    def idle_bytes(self) -> int:
        """Return the memory held for the graphs that torch does not count as allocated."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share their memory: they never run at the same time.

    All of a recorder's graphs must be kept until its last `record`.
    """

    def __init__(self, device: torch.device) -> None:
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
        """Return the bytes of the graphs' memory pool that belong to no tensor."""
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
    """Counts of one round."""
    advance: int
    """Increase of the batch's `max_position` in one round."""


class GraphedRounds:
    """A decoder that runs the first round of a kind, and captures the second for all later ones.

    Args:
        state: The batch.
        decoder: The decoder whose rounds are captured.
        recorder: Captures them.
    """

    def __init__(self, state: DecodeState, decoder: GraphableDecoder, recorder: Recorder) -> None:
        self._state, self._decoder, self._recorder = state, decoder, recorder
        self._graphs: dict[tuple[int, int], _Graph | None] = {}
        """By tokens of a round and `max_position` before it; None: run once, not captured yet."""

    def __call__(self, max_tokens: int) -> Round:
        state, batch, n = self._state, self._state.batch, min(max_tokens, self._decoder.max_tokens)
        if (instead := self._decoder.prepare(n)) is not None:
            return instead
        beyond = self._rounded_up(n) - batch.max_position
        batch.max_position += beyond
        key = n, batch.max_position
        if key in self._graphs:
            graph = self._graphs[key] or self._capture(n)
            self._graphs[key] = graph
            result = graph.replay()
            state.counters += graph.counters
            batch.max_position += graph.advance
        else:
            syncs = state.counters.syncs
            result = self._decoder.run(n)
            assert state.counters.syncs == syncs, "graphable rounds may not sync with the host"
            self._graphs[key] = None
        batch.max_position -= beyond
        return result

    def _rounded_up(self, n: int) -> int:
        """Return the least `max_position` from the true one on whose n next slots end a window."""
        slots = -(-(self._state.batch.max_position + n) // WINDOW_STEP) * WINDOW_STEP
        return min(slots, self._state.cache.slots) - n

    def _capture(self, n: int) -> _Graph:
        state, batch = self._state, self._state.batch
        counters, max_position = state.counters, batch.max_position
        state.counters = Counters()
        replay = self._recorder.record(partial(self._decoder.run, n), state)
        graph = _Graph(replay, state.counters, batch.max_position - max_position)
        state.counters, batch.max_position = counters, max_position
        return graph


def graphed(state: DecodeState, decoder: Decoder, recorder: Recorder) -> Decoder:
    """Return a decoder that replays graphs if the given one is graphable, else the given one."""
    return (
        GraphedRounds(state, decoder, recorder)
        if isinstance(decoder, GraphableDecoder)
        else decoder
    )


@dataclass
class GraphedBatch:
    """A batch that generations use in turn, with the graphs captured on its tensors."""

    state: DecodeState
    recorder: Recorder
    _decoders: dict[Strategy, Decoder] = field(default_factory=dict)

    def start(self, strategy: Strategy) -> Decoder:
        """Return a decoder that advances the batch as well, with the graphs captured before."""
        if strategy in self._decoders:
            return self._decoders[strategy]
        plain = advancing(self.state.batch, strategy.start(self.state))
        decoder = graphed(self.state, plain, self.recorder)
        if decoder is not plain:
            self._decoders[strategy] = decoder
        return decoder


class RoundGraphs:
    """Keeps graphs from one generation to the next, as long as batches have the same shape.

    Args:
        new_recorder: Returns a recorder for the graphs of one batch.
    """

    def __init__(self, new_recorder: Callable[[], Recorder]) -> None:
        self.new_recorder = new_recorder
        self._kept: GraphedBatch | None = None

    def take(
        self, model: Llama, rows: int, *, slots: int, sampling: Sampling, seed: int, spare: int = 0
    ) -> GraphedBatch:
        """Return a batch for one generation alone; arguments as of `allocate`.

        More spare slots than are asked for do no harm.
        """
        batch, self._kept = self._kept, None
        if batch is not None:
            state = batch.state
            shape = len(state.batch), state.cache.slots, state.sampling
            fits = shape == (rows, slots, sampling) and state.cache.spare >= spare
            if state.model is model and fits:
                reset(state, seed)
                return batch
        state = allocate(model, rows, slots=slots, sampling=sampling, seed=seed, spare=spare)
        return GraphedBatch(state, self.new_recorder())

    def give_back(self, batch: GraphedBatch) -> None:
        """Keep the batch of a generation that has ended, instead of any other."""
        self._kept = batch

    def idle_bytes(self) -> int:
        """Return the memory of the kept graphs that torch does not count as allocated."""
        return 0 if self._kept is None else self._kept.recorder.idle_bytes()


def round_graphs(device: torch.device) -> RoundGraphs | None:
    """Return where to keep graphs, or None for a device that has none."""
    return RoundGraphs(partial(CudaRecorder, device)) if device.type == "cuda" else None
