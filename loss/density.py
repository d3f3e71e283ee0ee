"""The density penalty: how far the share of layers that routers let run is from a target.

Independent of models. Every row has a penalty of its own, so that the sum does not depend on how a
batch is split over microbatches and ranks. Layers l count from 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """The penalty on the density of a model with routers."""

    weight: float = 0.0
    """The mean over sequences of (density - target)^2 is added to J with this weight, where the
    density of a sequence is the mean over layers and tokens of the probability to run."""
    target: float = 0.5
    """Share of layers that a token is to run on average, 0 to 1."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if not self.weight >= 0.0:
            found.append(f"density.weight: {self.weight}, must not be negative")
        if not 0.0 <= self.target <= 1.0:
            found.append(f"density.target: {self.target}, must lie in [0, 1]")
        return found


def density_penalty_sum(gates: Mapping[int, Tensor], config: DensityConfig) -> Tensor:
    """Return weight * sum over rows of (mean over layers and tokens of p - target)^2.

    The caller divides by the rows of its global batch.

    Args:
        gates: {l: p of layer l}, each (batch, seq) fp32.
        config: Weight and target.

    Returns:
        Scalar fp32.
    """
    off = _row_means(gates) - config.target
    return config.weight * off.square().sum()


@torch.no_grad()
def running_share_sum(gates: Mapping[int, Tensor]) -> Tensor:
    """Return the sum over rows of the share of layers and tokens with p > 0.5, scalar fp32."""
    return _row_means({l: (p > 0.5).float() for l, p in gates.items()}).sum()


def _row_means(values: Mapping[int, Tensor]) -> Tensor:
    """Return the means over layers and tokens, (batch,)."""
    return torch.stack([value.mean(dim=1) for value in values.values()]).mean(dim=0)
