"""What steps came to, on the host: read one step late, so that the device is never waited for."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from train.loop.step import StepResult


@dataclass(frozen=True)
class StepMetrics:
    """One step's totals over all ranks; layers l count from 0."""

    t: int
    J: float
    exit_losses: dict[int, float]
    """{l: mean token loss of the exit after layer l} of the exits that were on."""
    density: float
    """Share of layers and tokens that routers let run; 0 without any."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    stop: bool
    """Whether any rank has been asked to stop."""
    local: Tensor
    """This rank's own part of the totals, see StepResult."""

    @property
    def finite(self) -> bool:
        """Whether the weights were updated: every loss and the gradient were finite everywhere."""
        return all(map(math.isfinite, (self.J, self.grad_norm, *self.exit_losses.values())))

    def bad_losses_here(self) -> list[str]:
        """Return which losses were not finite on this rank itself, in words."""
        L = (len(self.local) - 4) // 2
        return [
            f"the loss of the exit after layer {l} is {value}"
            for l, value in enumerate(self.local[1 : L + 1].tolist())
            if not math.isfinite(value)
        ]


class DeferredReader:
    """Hands out each step's outcome once the next step has been given to the device."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._held: tuple[int, Tensor, StepResult, torch.cuda.Event | None] | None = None

    def push(self, t: int, result: StepResult) -> list[StepMetrics]:
        """Take in step t; return the outcome of the step before it, if it was not read yet."""
        event = None
        if result.totals.is_cuda:
            copy = torch.empty_like(result.totals, device="cpu", pin_memory=True)
            copy.copy_(result.totals, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            copy = result.totals
        ready = self.drain()
        self._held = (t, copy, result, event)
        return ready

    def drain(self) -> list[StepMetrics]:
        """Return the outcome that is still held, waiting for the device."""
        if self._held is None:
            return []
        t, copy, result, event = self._held
        self._held = None
        if event is not None:
            event.synchronize()
        return [_outcome(t, copy.tolist(), result.local)]


def _outcome(t: int, values: list[float], local: Tensor) -> StepMetrics:
    L = (len(values) - 4) // 2
    sums, counts = values[1 : L + 1], values[L + 1 : 2 * L + 1]
    losses = {
        l: total / count for l, (total, count) in enumerate(zip(sums, counts, strict=True)) if count
    }
    J, (density, grad_norm, stop) = values[0], values[-3:]
    return StepMetrics(t, J, losses, density, grad_norm, stop > 0, local)
