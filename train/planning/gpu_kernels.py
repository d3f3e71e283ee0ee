"""GPU kernels' memory for the backward pass, on CPU tensors without data.

Two of torch's CPU kernels keep other tensors than its GPU kernels: the CPU computes RMSNorm in
steps that each keep an fp32 copy, and has another flash attention. The loss, one kernel a chunk on
a GPU, runs block by block on a CPU. Only shapes matter here; nothing is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loss import softmax
from loss.softmax import TokenLosses


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Replace RMSNorm, bfloat16 attention and losses by stand-ins of the same memory as on a GPU.

    In torch.nn.functional itself: a TorchFunctionMode would not reach the blocks that activation
    checkpointing runs again, in the backward pass.
    """
    on_cpu = F.rms_norm, F.scaled_dot_product_attention
    losses = softmax.token_losses, softmax.token_divergences

    def attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return (_attention if q.dtype == torch.bfloat16 else on_cpu[1])(q, k, v, **how)

    F.rms_norm, F.scaled_dot_product_attention = _rms_norm, attention  # type: ignore[assignment]
    softmax.token_losses = _token_losses
    softmax.token_divergences = _token_divergences
    try:
        yield
    finally:
        F.rms_norm, F.scaled_dot_product_attention = on_cpu
        softmax.token_losses, softmax.token_divergences = losses


def _rms_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    out: Tensor = _FusedRMSNorm.apply(x, weight)
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out


def _token_losses(logits: Tensor, labels: Tensor, **how: Any) -> TokenLosses:
    objective, found = (labels.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
    return TokenLosses(objective, found, None)


def _token_divergences(
    teacher: Tensor, student: Tensor, has_loss: Tensor, temperature: float
) -> Tensor:
    gradient = torch.empty_like(student)  # The kernel writes it aside, for a copy.
    return gradient.new_empty(len(student), dtype=torch.float32)


class _FusedRMSNorm(torch.autograd.Function):
    """A stand-in for aten::_fused_rms_norm, which keeps its input and an fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        inverse_rms = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
