"""The gradient of a matrix, summed over chunks of tokens in fp32."""

import torch
from torch import Tensor

_CONVERTED_ROWS = 2048
"""Columns of a low-precision factor that are in fp32 at once, where torch has no such product."""


def add_product(total: Tensor | None, grad: Tensor, rows: Tensor, *, alpha: float) -> Tensor:
    """Return total + alpha grad^T rows, computed in place and never rounded below fp32.

    Args:
        total: (out, in) fp32; None: 0, which is not written first.
        grad: (n, out), any float dtype.
        rows: (n, in), same dtype.
        alpha: A constant.
    """
    beta = 1.0 if total is not None else 0.0
    if total is None:
        total = rows.new_empty(grad.shape[1], rows.shape[1], dtype=torch.float32)
    if grad.dtype == torch.float32:
        return torch.addmm(total, grad.t(), rows, beta=beta, alpha=alpha, out=total)
    if grad.is_cuda:
        return torch.addmm(total, grad.t(), rows, torch.float32, beta=beta, alpha=alpha, out=total)
    rows = rows.float()
    for part, columns in zip(
        total.split(_CONVERTED_ROWS), grad.split(_CONVERTED_ROWS, 1), strict=True
    ):
        torch.addmm(part, columns.float().t(), rows, beta=beta, alpha=alpha, out=part)
    return total
