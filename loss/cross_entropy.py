"""The one cross entropy: a linear head and a softmax over the vocabulary, in chunks of tokens.

However many exits a step has, one chunk of logits is alive at a time. Each chunk's gradient is
taken at once, so no logits are kept for the backward pass and none are computed twice; what
remains is the gradient of each exit's hidden state and one fp32 sum for the head. Knows nothing of
layers or schedules.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Label of a position that has no loss."""


def weighted_cross_entropy_sums(
    hidden: Sequence[Tensor],
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Return sum_k weights[k] * CE_k and the CE_k, where CE_k sums the token losses of exit k.

    Args:
        hidden: K tensors (batch, seq, dim), normed, any float dtype.
        head_weight: (vocab, dim), same dtype.
        labels: (batch, seq) int64; IGNORE_INDEX has no loss and no gradient.
        weights: (K,) fp32 on the host, constants.
        chunk_rows: Tokens whose logits, (chunk_rows, vocab), are alive at once.

    Returns:
        The weighted sum, scalar fp32, differentiable in `hidden` and `head_weight`; and the
        unweighted sums, (K,) fp32, detached.
    """
    if torch.is_grad_enabled():
        total, sums = _LinearCrossEntropy.apply(head_weight, labels, weights, chunk_rows, *hidden)
        return total, sums
    sums, _, _ = _sums_and_gradients(
        hidden, head_weight, labels, None, chunk_rows=chunk_rows, head_gradient=False
    )
    return (sums * weights.to(sums.device)).sum(), sums


class _LinearCrossEntropy(torch.autograd.Function):
    """All exits at once: the head's gradient is summed over them in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        head_weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        chunk_rows: int,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sums, grads, head_grad = _sums_and_gradients(
            hidden,
            head_weight,
            labels,
            weights.tolist(),
            chunk_rows=chunk_rows,
            head_gradient=ctx.needs_input_grad[0],
        )
        ctx.grads = (head_grad, grads)
        ctx.mark_non_differentiable(sums)
        return (sums * weights.to(sums.device)).sum(), sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        head_grad, grads = scaled_gradients(ctx, grad_total)
        return head_grad, None, None, None, *grads


def scaled_gradients(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Return, once, what `forward` left in ctx.grads, times the gradient of its result.

    In place, so that no second copy is ever alive.
    """
    assert ctx.grads is not None, "a chunked loss's gradient is used up by one backward pass"
    head_grad, grads = ctx.grads
    ctx.grads = None
    for g in grads:
        g.mul_(grad_total)
    if head_grad is not None:
        head_grad.mul_(grad_total)
    return head_grad, grads


def _sums_and_gradients(
    hidden: Sequence[Tensor],
    head_weight: Tensor,
    labels: Tensor,
    weights: Sequence[float] | None,
    *,
    chunk_rows: int,
    head_gradient: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Run every exit chunk by chunk; with `weights`, take gradients on the way."""
    flat_labels = labels.flatten()
    sums = torch.zeros(len(hidden), dtype=torch.float32, device=head_weight.device)
    grads = []
    head_grad = torch.zeros_like(head_weight, dtype=torch.float32) if head_gradient else None
    for k, h in enumerate(hidden):
        rows = h.flatten(0, -2)
        row_grads = torch.zeros_like(rows) if weights is not None else None
        for begin in range(0, rows.shape[0], chunk_rows):
            chunk = slice(begin, begin + chunk_rows)
            loss_sum, log_probs = _chunk_loss(rows[chunk], head_weight, flat_labels[chunk])
            sums[k] += loss_sum
            if row_grads is not None and weights is not None and weights[k]:
                logits_grad = _logits_gradient(log_probs, flat_labels[chunk])
                logits_grad = logits_grad.mul_(weights[k]).to(rows.dtype)
                torch.mm(logits_grad, head_weight, out=row_grads[chunk])
                if head_grad is not None:
                    head_grad += logits_grad.t() @ rows[chunk]
                del logits_grad
            del log_probs
        if row_grads is not None:
            grads.append(row_grads.view_as(h))
    return sums, grads, None if head_grad is None else head_grad.to(head_weight.dtype)


def _chunk_loss(rows: Tensor, head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of rows: (n, dim), and their log-probabilities, (n, vocab) fp32."""
    log_probs = F.log_softmax(F.linear(rows, head_weight), -1, dtype=torch.float32)
    token_losses = -log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels != IGNORE_INDEX, token_losses, 0.0).sum(), log_probs


def _logits_gradient(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Turn log_probs: (n, vocab) in place into the summed loss's gradient by the logits."""
    target = labels.clamp(min=0).unsqueeze(-1)
    grad = log_probs.exp_()  # softmax - onehot
    grad.scatter_add_(-1, target, torch.full_like(target, -1, dtype=grad.dtype))
    return grad.mul_((labels != IGNORE_INDEX).unsqueeze(-1))
