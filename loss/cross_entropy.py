"""The one cross entropy: a linear head and a softmax over the vocabulary, in chunks of tokens.

However many exits a step has, one chunk of logits is alive at a time. Each chunk's gradient is
taken at once, so no logits are kept for the backward pass and none are computed twice; what
remains is the gradient of each exit's hidden state and one fp32 sum for the head. Independent of
layers and schedules.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Label of a position that has no loss."""


class ExitTokens(NamedTuple):
    """The tokens that one exit has a loss on, and the exit's weight."""

    hidden: Tensor
    """(..., dim), normed, any float dtype."""
    labels: Tensor
    """(...) int64; IGNORE_INDEX has no loss and no gradient."""
    weight: float
    """Of the exit, a constant."""
    by_confidence: bool = False
    """Weigh each token by its largest probability as well, a constant in the gradient."""


def weighted_cross_entropy_sums(
    exits: Sequence[ExitTokens], head_weight: Tensor, *, chunk_rows: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return sum_k weight_k sum over tokens of c (CE + z_loss log^2 Z), and the plain sums of CE.

    Z is the softmax's normaliser: a positive z_loss draws it to 1 (PaLM, arXiv 2204.02311, section
    5). c is 1, or the token's largest probability where exit k has `by_confidence`.

    Args:
        exits: K exits, with hidden states of one dtype.
        head_weight: (vocab, dim), same dtype.
        chunk_rows: Tokens whose logits, (chunk_rows, vocab), are alive at once.
        z_loss: See above.

    Returns:
        The weighted sum, scalar fp32, differentiable in every `hidden` and `head_weight`; and the
        sums of CE of each exit, (K,) fp32, detached, with neither weight nor z_loss.
    """
    if torch.is_grad_enabled():
        hidden = [e.hidden for e in exits]
        total, sums = _LinearCrossEntropy.apply(head_weight, exits, chunk_rows, z_loss, *hidden)
        return total, sums
    total, sums, _, _ = _sums_and_gradients(
        exits, head_weight, chunk_rows=chunk_rows, z_loss=z_loss
    )
    return total, sums


class _LinearCrossEntropy(torch.autograd.Function):
    """All exits at once: the head's gradient is summed over them in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        head_weight: Tensor,
        exits: Sequence[ExitTokens],
        chunk_rows: int,
        z_loss: float,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # `hidden` is that of `exits`, passed by itself for autograd.
        total, sums, grads, head_grad = _sums_and_gradients(
            exits,
            head_weight,
            chunk_rows=chunk_rows,
            z_loss=z_loss,
            gradients=True,
            head_gradient=ctx.needs_input_grad[0],
        )
        ctx.grads = (head_grad, grads)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        head_grad, grads = scaled_gradients(ctx, grad_total)
        return head_grad, None, None, None, *grads


def scaled_gradients(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Return, once, the gradients in ctx.grads times that of the result of `forward`.

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
    exits: Sequence[ExitTokens],
    head_weight: Tensor,
    *,
    chunk_rows: int,
    z_loss: float,
    gradients: bool = False,
    head_gradient: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Run every exit chunk by chunk, and compute gradients on the way where `gradients` is True."""
    sums = torch.zeros(2, len(exits), dtype=torch.float32, device=head_weight.device)
    grads = []
    head_grad = torch.zeros_like(head_weight, dtype=torch.float32) if head_gradient else None
    for k, (hidden, labels, weight, by_confidence) in enumerate(exits):
        rows, flat_labels = hidden.flatten(0, -2), labels.flatten()
        row_grads = torch.zeros_like(rows) if gradients else None
        for begin in range(0, rows.shape[0], chunk_rows):
            chunk = slice(begin, begin + chunk_rows)
            loss = _chunk_loss(rows[chunk], head_weight, flat_labels[chunk], by_confidence)
            sums[0, k] += loss.objective_sum(z_loss)
            sums[1, k] += loss.cross_entropy_sum()
            if row_grads is not None and weight:
                logits_grad = loss.to_logits_gradient(z_loss).mul_(weight).to(rows.dtype)
                torch.mm(logits_grad, head_weight, out=row_grads[chunk])
                if head_grad is not None:
                    head_grad += logits_grad.t() @ rows[chunk]
                del logits_grad
            del loss
        if row_grads is not None:
            grads.append(row_grads.view_as(hidden))
    weights = torch.tensor([e.weight for e in exits], dtype=torch.float32).to(sums.device)
    total = (sums[0] * weights).sum()
    return total, sums[1], grads, None if head_grad is None else head_grad.to(head_weight.dtype)


class _ChunkLoss(NamedTuple):
    """The loss of n tokens, from their logits."""

    log_probs: Tensor
    """(n, vocab) fp32."""
    target: Tensor
    """(n, 1) int64: the label; arbitrary where there is none."""
    has_loss: Tensor
    """(n,) bool."""
    factor: Tensor
    """(n,), a constant: `has_loss`, or that times the largest probability."""
    cross_entropy: Tensor
    """(n,) fp32, meaningless where there is no label."""
    log_normaliser: Tensor
    """(n,) fp32: log Z."""

    def cross_entropy_sum(self) -> Tensor:
        return torch.where(self.has_loss, self.cross_entropy, 0.0).sum()

    def objective_sum(self, z_loss: float) -> Tensor:
        losses = self.cross_entropy
        if z_loss:
            losses = losses + z_loss * self.log_normaliser**2
        return torch.where(self.has_loss, losses * self.factor, 0.0).sum()

    def to_logits_gradient(self, z_loss: float) -> Tensor:
        """Turn log_probs in place into the gradient of `objective_sum` by the logits."""
        grad = self.log_probs.exp_()  # softmax (1 + 2 z_loss log Z) - onehot
        if z_loss:
            grad.mul_((1.0 + 2.0 * z_loss * self.log_normaliser).unsqueeze(-1))
        grad.scatter_add_(-1, self.target, torch.full_like(self.target, -1, dtype=grad.dtype))
        return grad.mul_(self.factor.unsqueeze(-1))


def _chunk_loss(
    rows: Tensor, head_weight: Tensor, labels: Tensor, by_confidence: bool
) -> _ChunkLoss:
    """Compute the loss of rows: (n, dim), with labels: (n,)."""
    logits = F.linear(rows, head_weight)
    log_probs = F.log_softmax(logits, -1, dtype=torch.float32)
    target = labels.clamp(min=0).unsqueeze(-1)
    log_p = log_probs.gather(-1, target).squeeze(-1)
    log_normaliser = logits.gather(-1, target).squeeze(-1).float() - log_p
    has_loss = labels != IGNORE_INDEX
    factor = has_loss * log_probs.amax(-1).exp() if by_confidence else has_loss
    return _ChunkLoss(log_probs, target, has_loss, factor, -log_p, log_normaliser)
