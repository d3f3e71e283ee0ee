"""Batches out of a mixture of sources, as a pure function of the seed and the rows' numbers.

Independent of the model, of files and of process groups: rank and world size are numbers here.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from data.boundaries import Boundaries
from data.mixture import Mixture
from data.shards import NO_LOSS
from data.step_rows import Ids, StepRows


@dataclass(frozen=True)
class Microbatch:
    """The sequences of one forward pass on one rank."""

    tokens: torch.Tensor
    """(batch, seq) int64."""
    labels: torch.Tensor
    """(batch, seq) int64: the token after each of `tokens`, NO_LOSS where it is not learnt."""
    samples: torch.Tensor
    """(batch,) int64: row of each sequence in the global batch; the key of its layer dropout."""
    documents: torch.Tensor | None = None
    """(batch, seq) int64: number of each token's document in its row; None: attention does not
    stop at documents."""

    @property
    def num_labels(self) -> int:
        """Number of tokens that have a loss."""
        return int((self.labels != NO_LOSS).sum())

    def pin_memory(self) -> "Microbatch":
        """Return a copy in page-locked memory, from which copies to a GPU do not block.

        What is there already is not copied.
        """
        return Microbatch(
            self.tokens.pin_memory(),
            self.labels.pin_memory(),
            self.samples,
            None if self.documents is None else self.documents.pin_memory(),
        )

    def to(self, device: torch.device) -> "Microbatch":
        """Return a copy on a device; `samples` stay on the host."""
        host = self.pin_memory() if device.type == "cuda" else self
        return Microbatch(
            host.tokens.to(device, non_blocking=True),
            host.labels.to(device, non_blocking=True),
            host.samples,
            None if host.documents is None else host.documents.to(device, non_blocking=True),
        )


class TokenLoader:
    """Distributes the rows of a global batch over ranks and microbatches.

    A batch may hold the end of one epoch and the start of the next. Microbatch m holds the rows
    [m, m + 1) * world_size * microbatch_size of the batch, of which rank r takes the r-th part: the
    global batch is the same for any number of ranks.

    Args:
        mixture: the rows, endless.
        global_batch_size: sequences per step, over all ranks and microbatches; a ramp has fewer.
        microbatch_size: sequences per rank and forward pass; 0: all of its part of a batch.
        rank: this process among those with data of their own.
        world_size: number of them.
        boundaries: number the documents of each row; None does not.

    Raises:
        ValueError: the sizes do not divide.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch_size: int,
        microbatch_size: int,
        rank: int = 0,
        world_size: int = 1,
        boundaries: Boundaries | None = None,
    ) -> None:
        if global_batch_size < 1 or microbatch_size < 0:
            raise ValueError(
                f"global_batch_size {global_batch_size} must be at least 1 and microbatch_size"
                f" {microbatch_size} at least 0"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, world_size {world_size})")
        if global_batch_size % (world_size * max(microbatch_size, 1)):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of world_size"
                f" {world_size} * microbatch_size {microbatch_size}, change one of the three"
            )
        self.mixture = mixture
        self.global_batch_size = global_batch_size
        """Sequences per step, over all ranks and microbatches."""
        self._microbatch_size = microbatch_size
        self._rank = rank
        self._world_size = world_size
        self._boundaries = boundaries

    def batch(self, rows: Ids) -> list[Microbatch]:
        """Return this rank's microbatches of a global batch, in order.

        Args:
            rows: (its size,) int64, the numbers of its rows in the mixture.
        """
        size = self._microbatch_size or len(rows) // self._world_size
        samples = np.arange(len(rows)).reshape(-1, self._world_size, size)[:, self._rank]
        return [self._read(rows[samples[m]], samples[m]) for m in range(len(samples))]

    def batches(
        self, rows: StepRows, stop: int, *, depth: int = 2, pin_memory: bool = False
    ) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield (t, batch(rows.at(t))) for t in [rows.step, stop).

        A background thread reads ahead. It ends with the iterator, also when the caller closes it
        early.

        Args:
            rows: the rows of every step, from the first on.
            stop: step after the last.
            depth: batches to hold ready, at least 1.
            pin_memory: put them in page-locked memory, where there is CUDA.
        """
        pin = pin_memory and torch.cuda.is_available()
        steps = iter(range(rows.step, stop))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="token-loader") as reader:
            ahead: deque[Future[list[Microbatch]]] = deque()
            for t in islice(steps, depth):
                ahead.append(reader.submit(self._load, rows.at(t), pin=pin))
            for t in range(rows.step, stop):
                batch = ahead.popleft().result()
                for next_t in islice(steps, 1):
                    ahead.append(reader.submit(self._load, rows.at(next_t), pin=pin))
                yield t, batch

    def _load(self, rows: Ids, *, pin: bool) -> list[Microbatch]:
        """Return batch(rows), in page-locked memory where `pin` is True."""
        batch = self.batch(rows)
        return [microbatch.pin_memory() for microbatch in batch] if pin else batch

    def _read(self, rows: Ids, samples: Ids) -> Microbatch:
        """Read one microbatch: rows of the mixture, and their indices in the global batch."""
        tokens, labels = self.mixture.read(rows)
        return microbatch(tokens, labels, samples, self._boundaries)


def microbatch(tokens: Ids, labels: Ids, samples: Ids, boundaries: Boundaries | None) -> Microbatch:
    """Return a microbatch of some rows; without boundaries, attention crosses their documents."""
    documents = None if boundaries is None else boundaries.document_numbers(tokens)
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        samples=torch.tensor(samples),
        documents=None if documents is None else torch.from_numpy(documents),
    )
