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

from loss import softmax
from loss.head_gradient import add_product

_CACHE_ELEMENTS = 2**19
"""Logits that a core's caches hold: 2 MiB in fp32."""


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
    total = torch.zeros((), dtype=torch.float32, device=head_weight.device)
    sums = torch.zeros(len(exits), dtype=torch.float32, device=head_weight.device)
    grads, head_grad = [], None
    chunk_rows = min(_rows_at_once(head_weight, chunk_rows), max(e.labels.numel() for e in exits))
    buffer = head_weight.new_empty(chunk_rows, len(head_weight))
    for k, (hidden, labels, weight, by_confidence) in enumerate(exits):
        rows, trained = hidden.flatten(0, -2), gradients and weight != 0.0
        if gradients:
            grads.append(torch.empty_like(rows) if trained else torch.zeros_like(rows))
        for begin in range(0, len(rows), chunk_rows):
            chunk = slice(begin, begin + chunk_rows)
            logits = buffer[: len(rows[chunk])]
            torch.mm(rows[chunk], head_weight.t(), out=logits)
            losses = softmax.token_losses(
                logits,
                labels.flatten()[chunk],
                z_loss=z_loss,
                by_confidence=by_confidence,
                gradient=trained,
            )
            total.add_(losses.objective.sum(), alpha=weight)
            sums[k] += losses.cross_entropy.sum()
            if trained:
                grad, taught = grads[k][chunk], rows[chunk]
                torch.addmm(grad, logits, head_weight, beta=0, alpha=weight, out=grad)
                if losses.scale is not None:
                    grad.mul_(losses.scale)
                    taught = taught * losses.scale
                if head_gradient:
                    head_grad = add_product(head_grad, logits, taught, alpha=weight)
    if head_gradient and head_grad is None:
        head_grad = torch.zeros_like(head_weight)
    shaped = [g.view_as(e.hidden) for g, e in zip(grads, exits, strict=False)]
    return total, sums, shaped, None if head_grad is None else head_grad.to(head_weight.dtype)


def _rows_at_once(head_weight: Tensor, chunk_rows: int) -> int:
    """Return the tokens of a chunk: fewer on CPUs where their logits then stay in the cache.

    Not where it would be less than twice the width of the head, which every chunk's products read
    and write as a whole.
    """
    vocab_size, dim = head_weight.shape
    in_cache = torch.get_num_threads() * _CACHE_ELEMENTS // vocab_size
    if head_weight.device.type != "cpu" or head_weight.dtype != torch.float32:
        return chunk_rows
    return min(chunk_rows, in_cache) if in_cache >= 2 * dim else chunk_rows
