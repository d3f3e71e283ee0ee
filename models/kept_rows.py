"""Run a function on some rows of a batch, with the least traffic forward and backward.

The plain form, `index_select` and `index_copy`, makes three more passes over the whole gradient,
and adds rows to it by atomics, as if one row could be taken twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rows:
    """The rows that run, and the gradient of all rows on its way from their end to their start."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows
        """(kept,) int64; None: one token, whose result is discarded."""
        self.grad: Tensor | None = None


def on_rows(function: Callable[[Tensor], Tensor], h: Tensor, rows: Tensor) -> Tensor:
    """Return h: (batch, seq, dim) with some rows, (kept,) int64, replaced by function(those rows).

    The gradient reaches h through the function alone, whose result has to depend on its input.
    """
    return _run(function, h, _Rows(rows))


def on_no_row(function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Return h: (batch, seq, dim), and call the function on its first token, (1, 1, dim).

    What the function depends on has a gradient of zeros, and a part in the backward.
    """
    return _run(function, h, _Rows(None))


def _run(function: Callable[[Tensor], Tensor], h: Tensor, shared: _Rows) -> Tensor:
    out = function(_Gather.apply(h, shared))
    result: Tensor = _Scatter.apply(h.detach(), out, shared)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, shared: _Rows) -> Tensor:
        ctx.shared = shared
        return h[:1, :1].clone() if shared.rows is None else h.index_select(0, shared.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kept: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        grad, shared.grad = shared.grad, None
        return grad if shared.rows is None else grad.index_copy(0, shared.rows, grad_kept), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, out: Tensor, shared: _Rows) -> Tensor:
        ctx.shared = shared
        return h.view_as(h) if shared.rows is None else h.index_copy(0, shared.rows, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        shared = ctx.shared
        shared.grad = grad
        if shared.rows is None:
            return None, torch.zeros_like(grad[:1, :1]), None
        return None, grad.index_select(0, shared.rows), None
