"""Batches of windows out of a stream of tokens, as a pure function of (seed, batch number).

Knows nothing of the model, of files or of how ranks talk: rank and world size are numbers here.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from data.permutation import permute
from data.shards import TokenStream


@dataclass(frozen=True)
class Microbatch:
    """The sequences that one rank puts through the model at once."""

    tokens: torch.Tensor
    """(batch, seq) int64."""
    labels: torch.Tensor
    """(batch, seq) int64: the token after each of `tokens`."""
    samples: torch.Tensor
    """(batch,) int64: row of each sequence in the global batch; the key of its layer dropout."""

    def pin_memory(self) -> "Microbatch":
        """Return a copy in page-locked memory, from where a GPU copies without blocking."""
        return Microbatch(
            self.tokens.pin_memory(), self.labels.pin_memory(), self.samples.pin_memory()
        )


def batch_number(t: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Return the global batch of step `t`: the t-th number, from 0, that is not skipped.

    Args:
        t: optimizer step, from 0.
        skipped: half-open ranges [start, stop) of batch numbers that are never dealt, in any
            order; they may overlap.
    """
    number, behind = t, 0  # `behind` is where the ranges that are passed end.
    for start, stop in sorted(skipped):
        if start > number:
            break
        number += max(stop - max(start, behind), 0)
        behind = max(stop, behind)
    return number


class TokenLoader:
    """Cuts a stream into windows and deals them out to steps, ranks and microbatches.

    Window i reads tokens [i * seq_len, i * seq_len + seq_len]: seq_len inputs and, one further,
    as many labels. Documents are packed: a window may hold the end of one and the start of the
    next. Row j of global batch b is number k = b * global_batch_size + j of an endless sequence:
    in epoch k // windows it is place k % windows of that epoch's permutation, so every epoch
    reads every window exactly once and a batch may hold the end of one epoch and the start of the
    next. Microbatch m holds the global rows [m, m + 1) * world_size * microbatch_size, of which
    rank r takes the r-th part: the global batch is the same for any number of ranks.

    Args:
        stream: the tokens of one split.
        seq_len: tokens per sequence.
        global_batch_size: sequences per step, over all ranks and microbatches.
        microbatch_size: sequences per rank and forward pass.
        seed: fixes the order.
        rank: this process among those with data of their own.
        world_size: number of them.
        shuffle: False reads the windows in order, in every epoch.

    Raises:
        ValueError: the sizes do not divide, or the stream has not one window.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        global_batch_size: int,
        microbatch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Check the sizes; see the class."""
        if min(seq_len, global_batch_size, microbatch_size) < 1:
            raise ValueError(
                f"seq_len {seq_len}, global_batch_size {global_batch_size} and microbatch_size"
                f" {microbatch_size} must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, world_size {world_size})")
        if global_batch_size % (world_size * microbatch_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of world_size"
                f" {world_size} * microbatch_size {microbatch_size}, change one of the three"
            )
        if len(stream) < seq_len + 1:
            raise ValueError(
                f"seq_len {seq_len} needs {seq_len + 1} tokens but the data has {len(stream)},"
                " give a shorter seq_len or more text"
            )
        self._stream = stream
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._microbatch_size = microbatch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._shuffle = shuffle

    @property
    def global_batch_size(self) -> int:
        """Sequences per step, over all ranks and microbatches."""
        return self._global_batch_size

    @property
    def windows(self) -> int:
        """Number of sequences in one epoch."""
        return (len(self._stream) - 1) // self._seq_len

    @property
    def dropped_tokens(self) -> int:
        """Tokens at the end of the stream that no window reads."""
        return len(self._stream) - 1 - self.windows * self._seq_len

    def epoch(self, number: int) -> int:
        """Return the epoch, from 0, of the first row of global batch `number`."""
        return number * self._global_batch_size // self.windows

    def batch(self, number: int) -> list[Microbatch]:
        """Return this rank's microbatches of global batch `number`, from 0, in order."""
        rows = np.arange(self._global_batch_size)
        rows = rows.reshape(-1, self._world_size, self._microbatch_size)[:, self._rank]
        places = number * self._global_batch_size + rows.flatten()
        epochs, windows = np.divmod(places, self.windows)
        if self._shuffle:
            windows = permute(windows, epochs, size=self.windows, seed=self._seed)
        windows = windows.reshape(rows.shape)
        return [self._read(windows[m], rows[m]) for m in range(len(rows))]

    def batches(
        self,
        start: int,
        stop: int,
        *,
        skipped: Sequence[tuple[int, int]] = (),
        depth: int = 2,
        pin_memory: bool = False,
    ) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield (t, batch(batch_number(t, skipped))) for t in [start, stop).

        A background thread reads ahead. It ends with the iterator, also when the caller leaves it
        early.

        Args:
            start: first step.
            stop: step after the last.
            skipped: half-open ranges of batch numbers that are never dealt, see `batch_number`.
            depth: batches to hold ready, at least 1.
            pin_memory: put them in page-locked memory, where there is CUDA.
        """
        pin = pin_memory and torch.cuda.is_available()
        numbers = (batch_number(t, skipped) for t in range(start, stop))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="token-loader") as reader:
            ahead: deque[Future[list[Microbatch]]] = deque()
            for number in islice(numbers, depth):
                ahead.append(reader.submit(self._load, number, pin=pin))
            for t in range(start, stop):
                batch = ahead.popleft().result()
                for number in islice(numbers, 1):
                    ahead.append(reader.submit(self._load, number, pin=pin))
                yield t, batch

    def _load(self, number: int, *, pin: bool) -> list[Microbatch]:
        """Return batch(number), in page-locked memory if asked."""
        batch = self.batch(number)
        return [microbatch.pin_memory() for microbatch in batch] if pin else batch

    def _read(self, windows: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]) -> Microbatch:
        """Read one microbatch: its windows and rows of the global batch, both (batch,) int64."""
        read = [self._stream.read(w * self._seq_len, self._seq_len + 1) for w in windows.tolist()]
        tokens = torch.from_numpy(np.stack(read))
        return Microbatch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            samples=torch.tensor(samples),
        )
