"""An exponential moving average of the weights, for evaluation and export.

Sharded as the weights are, in fp32. Independent of the optimizer, whose updates it follows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from models.llama import Llama
from train.parallel.local_part import local_part


def ema_decay(decay: float, t: int) -> float:
    """Return the decay of step t: min(decay, (1 + t) / (10 + t)), so that it forgets the start."""
    return min(decay, (1 + t) / (10 + t))


class WeightAverage:
    """The average of a model's weights: m = d m + (1 - d) w after every step, d = ema_decay.

    Every rank averages its own shards; there is no communication.
    """

    def __init__(self, model: Llama, decay: float) -> None:
        """Start at the weights as they are."""
        self._model, self._decay = model, decay
        self._weights: dict[str, Tensor] = model.state_dict()
        self.tensors = {name: value.detach().clone() for name, value in self._weights.items()}
        """{name of a weight: its average}, as checkpoints hold them."""

    @torch.no_grad()
    def restart(self) -> None:
        """Start again at the weights as they are."""
        for average, weight in self._pairs():
            average.copy_(weight)

    @torch.no_grad()
    def update_unless(self, bad: Tensor, t: int) -> None:
        """Take in the weights after step t, unless that step has updated nothing.

        Args:
            bad: Scalar bool on the device; the host does not wait for it.
            t: The step.
        """
        share = (~bad).float() * (1 - ema_decay(self._decay, t))
        for average, weight in self._pairs():
            average.lerp_(weight, share.to(average.device))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averages for its weights, and its own weights back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for unit in self._model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # A forward pass without a backward leaves weights gathered.
        for average, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, average in self.tensors.items():
            yield local_part(average), local_part(self._weights[name].detach())
