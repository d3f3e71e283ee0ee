"""Distillation from the last layer into the exits, in chunks of tokens, through the one LM head.

Hinton et al. (arXiv 1503.02531). As in `cross_entropy`, gradients are taken chunk by chunk on the
way forward, so that however many exits there are, the logits of one chunk of the teacher and of one
student are alive at a time. The teacher is a constant; the head's gradient is the students' alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loss import softmax
from loss.cross_entropy import scaled_gradients
from loss.head_gradient import add_product
from loss.softmax import IGNORE_INDEX


def weighted_divergence_sum(
    students: Sequence[Tensor],
    teacher: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    *,
    temperature: float,
    chunk_rows: int,
) -> Tensor:
    """Return sum_k weights[k] T^2 sum over tokens of KL(softmax(z / T) || softmax(z_k / T)).

    Args:
        students: K tensors (batch, seq, dim), normed, any float dtype; z_k are their logits.
        teacher: (batch, seq, dim), same dtype; z are its logits. It gets no gradient.
        head_weight: (vocab, dim), same dtype.
        labels: (batch, seq) int64; a position of IGNORE_INDEX has no loss and no gradient.
        weights: K constants.
        temperature: T.
        chunk_rows: Tokens whose logits, (chunk_rows, vocab), are alive at once, twice.

    Returns:
        Scalar fp32, differentiable in `students` and `head_weight`.
    """
    if not torch.is_grad_enabled():
        head_weight = head_weight.detach()
    total: Tensor = _Divergence.apply(
        head_weight, teacher.detach(), labels, weights, temperature, chunk_rows, *students
    )
    return total


class _Divergence(torch.autograd.Function):
    """All students at once: the head's gradient is summed over them in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        head_weight: Tensor,
        teacher: Tensor,
        labels: Tensor,
        weights: Sequence[float],
        temperature: float,
        chunk_rows: int,
        *students: Tensor,
    ) -> Tensor:
        has_loss = (labels != IGNORE_INDEX).flatten()
        taught, rows = teacher.flatten(0, -2), [h.flatten(0, -2) for h in students]
        grads = [torch.empty_like(h) for h in rows]
        head_grad = None
        total = torch.zeros((), dtype=torch.float32, device=head_weight.device)
        buffers = head_weight.new_empty(2, min(chunk_rows, len(taught)), len(head_weight))
        for begin in range(0, len(taught), chunk_rows):
            chunk = slice(begin, begin + chunk_rows)
            z, z_k = buffers[:, : len(taught[chunk])]
            torch.mm(taught[chunk], head_weight.t(), out=z)
            for h, grad, weight in zip(rows, grads, weights, strict=True):
                torch.mm(h[chunk], head_weight.t(), out=z_k)
                divergences = softmax.token_divergences(z, z_k, has_loss[chunk], temperature)
                total.add_(divergences.sum(), alpha=weight)
                torch.addmm(grad[chunk], z_k, head_weight, beta=0, alpha=weight, out=grad[chunk])
                if ctx.needs_input_grad[0]:
                    head_grad = add_product(head_grad, z_k, h[chunk], alpha=weight)
        head_grad = None if head_grad is None else head_grad.to(head_weight.dtype)
        shaped = [g.view_as(h) for g, h in zip(grads, students, strict=True)]
        ctx.grads = (head_grad, shaped)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        head_grad, grads = scaled_gradients(ctx, grad_total)
        return head_grad, None, None, None, None, None, *grads
