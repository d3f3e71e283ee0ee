"""Batches out of a mixture of sources, as a pure function of (seed, batch number).

Independent of the model, of files and of process groups: rank and world size are numbers here.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from data.mixture import Mixture
from data.shards import NO_LOSS
from data.windows import document_numbers


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
        """Return a copy in page-locked memory, from which copies to a GPU do not block."""
        return Microbatch(
            self.tokens.pin_memory(),
            self.labels.pin_memory(),
            self.samples,
            None if self.documents is None else self.documents.pin_memory(),
        )

    def to(self, device: torch.device) -> "Microbatch":
        """Return a copy on a device; `samples` stay on the host."""
        return Microbatch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.samples,
            None if self.documents is None else self.documents.to(device, non_blocking=True),
        )


def batch_number(t: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Return the global batch of step `t`: the t-th number, from 0, that is not skipped.

    Args:
        t: optimizer step, from 0.
        skipped: half-open ranges [start, stop) of batch numbers that are never used, in any
            order; they may overlap.
    """
    number, behind = t, 0  # `behind` is the end of the ranges so far.
    for start, stop in sorted(skipped):
        if start > number:
            break
        number += max(stop - max(start, behind), 0)
        behind = max(stop, behind)
    return number


class TokenLoader:
    """Distributes the rows of a mixture over steps, ranks and microbatches.

    Row j of global batch b is row b * global_batch_size + j of the mixture: a batch may hold the
    end of one epoch and the start of the next. Microbatch m holds the global rows
    [m, m + 1) * world_size * microbatch_size, of which rank r takes the r-th part: the global
    batch is the same for any number of ranks.

    Args:
        mixture: the rows, endless.
        global_batch_size: sequences per step, over all ranks and microbatches.
        microbatch_size: sequences per rank and forward pass.
        rank: this process among those with data of their own.
        world_size: number of them.
        bos_id: number the documents of each row, which begin with this token; None does not.
        eos_id: the token that ends them, see `document_numbers`.

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
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        if min(global_batch_size, microbatch_size) < 1:
            raise ValueError(
                f"global_batch_size {global_batch_size} and microbatch_size {microbatch_size}"
                " must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, world_size {world_size})")
        if global_batch_size % (world_size * microbatch_size):
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
        self._bos_id, self._eos_id = bos_id, eos_id

    def epochs(self, number: int) -> list[float]:
        """Return the epochs of each source that precede global batch `number`."""
        return self.mixture.epochs(number * self.global_batch_size)

    def batch(self, number: int) -> list[Microbatch]:
        """Return this rank's microbatches of global batch `number`, from 0, in order."""
        rows = np.arange(self.global_batch_size)
        rows = rows.reshape(-1, self._world_size, self._microbatch_size)[:, self._rank]
        return [self._read(rows[m], number) for m in range(len(rows))]

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

        A background thread reads ahead. It ends with the iterator, also when the caller closes it
        early.

        Args:
            start: first step.
            stop: step after the last.
            skipped: half-open ranges of batch numbers that are never used, see `batch_number`.
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
        """Return batch(number), in page-locked memory where `pin` is True."""
        batch = self.batch(number)
        return [microbatch.pin_memory() for microbatch in batch] if pin else batch

    def _read(self, samples: npt.NDArray[np.int64], number: int) -> Microbatch:
        """Read one microbatch: rows of global batch `number`, (batch,) int64."""
        tokens, labels = self.mixture.read(number * self.global_batch_size + samples)
        return microbatch(tokens, labels, samples, self._bos_id, self._eos_id)


def microbatch(
    tokens: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    bos_id: int | None,
    eos_id: int | None = None,
) -> Microbatch:
    """Return a microbatch of some rows; without `bos_id`, attention crosses their documents."""
    documents = None if bos_id is None else document_numbers(tokens, bos_id, eos_id)
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        samples=torch.tensor(samples),
        documents=None if documents is None else torch.from_numpy(documents),
    )
