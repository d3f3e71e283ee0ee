"""The totals of a step on the device, and its metrics on the host, read one step late."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.host_copy import HostCopy


class StepTotals:
    """What one step adds up over microbatches and ranks, fp32; layers l count from 0.

    All is packed into one tensor, which one all-reduce sums and one copy reads.

    Attributes:
        packed: (2 L + 4,); the other attributes are views of it.
        J: Scalar.
        exit_sums: (L,) token loss of each exit summed over the global batch, 0 where it was off.
        exit_tokens: (L,) number of tokens behind each.
        density: Share of layers and tokens that routers let run, scalar; 0 without any.
        grad_norm: Norm of the whole gradient before clipping, scalar.
        num_stops: How many ranks were requested to stop, scalar.
    """

    def __init__(self, packed: Tensor) -> None:
        L = (len(packed) - 4) // 2
        self.packed = packed
        J, self.exit_sums, self.exit_tokens, *rest = packed.split([1, L, L, 1, 1, 1])
        self.J, (self.density, self.grad_norm, self.num_stops) = J[0], (part[0] for part in rest)

    @classmethod
    def zeros(cls, L: int, device: torch.device) -> "StepTotals":
        """Return the totals of no microbatch at all."""
        return cls(torch.zeros(2 * L + 4, device=device))


class StepResult(NamedTuple):
    """What one step came to, still on the device."""

    totals: StepTotals
    """Over all ranks, the same on each."""
    local: StepTotals
    """This rank's part of them."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step came to over all ranks, on the host; layers l count from 0."""

    t: int
    J: float
    exit_losses: dict[int, float]
    """{l: mean token loss of the exit after layer l} of the exits that were on; of a batch without
    a label none."""
    density: float
    """Share of layers and tokens that routers let run; 0 without any."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    stop: bool
    """Whether any rank was requested to stop."""
    local: StepTotals
    """This rank's part, on the device."""

    @property
    def updated(self) -> bool:
        """Whether the weights were updated."""
        return self.finite and bool(self.exit_losses)

    @property
    def finite(self) -> bool:
        """Whether every loss and the gradient were finite everywhere."""
        return all(map(math.isfinite, (self.J, self.grad_norm, *self.exit_losses.values())))

    def local_bad_losses(self) -> list[str]:
        """Return a line for each loss of this rank itself that is not finite."""
        return [
            f"the loss of the exit after {l + 1} {'layers' if l else 'layer'} is {value}"
            for l, value in enumerate(self.local.exit_sums.tolist())
            if not math.isfinite(value)
        ]


class DeferredReader:
    """Reads the totals of each step after the next one is launched: the device never idles."""

    def __init__(self) -> None:
        self._pending: tuple[int, HostCopy, StepTotals] | None = None

    def push(self, t: int, result: StepResult) -> list[StepMetrics]:
        """Start copying the totals of step t; return the metrics of the step before, if unread."""
        copy = HostCopy(result.totals.packed)
        ready = self.drain()
        self._pending = t, copy, result.local
        return ready

    def drain(self) -> list[StepMetrics]:
        """Return the metrics of the step that is pending, if any, waiting for its copy."""
        if self._pending is None:
            return []
        t, copy, local = self._pending
        self._pending = None
        return [_metrics(t, StepTotals(torch.tensor(copy.read())), local)]


def _metrics(t: int, totals: StepTotals, local: StepTotals) -> StepMetrics:
    sums, counts = totals.exit_sums.tolist(), totals.exit_tokens.tolist()
    losses = {
        l: total / count for l, (total, count) in enumerate(zip(sums, counts, strict=True)) if count
    }
    return StepMetrics(
        t=t,
        J=totals.J.item(),
        exit_losses=losses,
        density=totals.density.item(),
        grad_norm=totals.grad_norm.item(),
        stop=totals.num_stops.item() > 0,
        local=local,
    )
