"""The early-exit loss J of LayerSkip and the weight of each exit in it.

LayerSkip (arXiv 2404.16710), section 4.1.2, eq. 5 and 6. l = layer index from 0, the exit after
layer l; L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loss.cross_entropy import weighted_cross_entropy_sums


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig:
    """How much each exit's loss weighs."""

    e_scale: float = 0.2
    """Weight of the exits before the last layer, 0 to 1. The paper: 0.1 to 0.2 for pretraining,
    1.0 for finetuning on a narrow domain or task."""
    chunk_rows: int = 4096
    """Tokens whose logits are alive at once: chunk_rows * vocab_size numbers."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if not 0.0 <= self.e_scale <= 1.0:
            found.append(f"early_exit.e_scale: {self.e_scale}, must lie in [0, 1]")
        if self.chunk_rows < 1:
            found.append(f"early_exit.chunk_rows: {self.chunk_rows}, must be at least 1")
        return found


class EarlyExitLoss(NamedTuple):
    """J and the parts it was made of."""

    total: Tensor
    """Scalar fp32: sum over exits of e_tilde * summed token loss / `num_tokens`."""
    per_exit: dict[int, Tensor]
    """{l: summed token loss of the exit after layer l}, scalar fp32 each, detached, unreduced."""


def e(l: int, L: int, e_scale: float) -> float:
    """Return the unnormalised weight of the exit after layer l.

    LayerSkip, eq. 6:
        e(l)     = e_scale * sum_{i=0}^{l} i                    for 0 <= l < L - 1
        e(L - 1) = L - 1 + e_scale * sum_{i=0}^{L-2} i
    so e(0) = 0: the exit after the first layer is never trained. For L = 1 the last layer's
    weight would be 0 too; it is 1.
    """
    if L == 1:
        return 1.0
    if l == L - 1:
        return L - 1 + e_scale * (L - 1) * (L - 2) / 2
    return e_scale * l * (l + 1) / 2


def e_tilde(active: Sequence[int], L: int, e_scale: float) -> dict[int, float]:
    """Return {l: e_tilde(t, l)} for the layers with C(t, l) = 1.

    LayerSkip, eq. 5: e_tilde(t, l) = C(t, l) e(l) / sum_{i=0}^{L-1} C(t, i) e(i). Where every
    active e(l) is 0 (only layer 0, or e_scale = 0, without the last layer) there is nothing to
    train and all weights are 0.
    """
    weights = {l: e(l, L, e_scale) for l in active}
    total = sum(weights.values())
    return {l: weight / total if total else 0.0 for l, weight in weights.items()}


def early_exit_loss(
    hidden: Mapping[int, Tensor],
    head_weight: Tensor,
    labels: Tensor,
    weights: Mapping[int, float],
    *,
    num_tokens: float,
    chunk_rows: int,
) -> EarlyExitLoss:
    """Return J(X, Y, t) = sum_l e_tilde(t, l) * J_CE(g(x_{l+1}), Y) (LayerSkip, section 4.1.2).

    Args:
        hidden: {l: norm(x_{l+1})}, each (batch, seq, dim).
        head_weight: (vocab, dim), the one LM head all exits share.
        labels: (batch, seq) int64; IGNORE_INDEX is left out.
        weights: {l: e_tilde(t, l)}.
        num_tokens: What the summed loss is divided by: the token count of the global batch, so
            that gradients do not depend on how it is split.
        chunk_rows: Tokens whose logits are alive at once.
    """
    layers = list(hidden)
    weight_tensor = torch.tensor([weights[l] / num_tokens for l in layers], dtype=torch.float32)
    total, sums = weighted_cross_entropy_sums(
        [hidden[l] for l in layers], head_weight, labels, weight_tensor, chunk_rows=chunk_rows
    )
    return EarlyExitLoss(total, dict(zip(layers, sums.unbind(), strict=True)))
