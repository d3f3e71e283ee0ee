"""The passes over one chunk of logits: the loss of each token, and its gradient over the logits.

On a GPU one compiled kernel, fp32 inside, that reads each logit twice and writes it once. On CPUs
torch's own operations in place, on blocks of rows that stay in a core's cache. Independent of the
head and of exits.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has no loss."""

_BLOCK_ELEMENTS = 2**17
"""Logits of a block per thread: 512 KiB of fp32, a part of the second-level cache."""
_MOST_BLOCKS = 32
"""Of a chunk. Each costs some calls, which only small chunks have to care about."""


class TokenLosses(NamedTuple):
    """The losses of n tokens, 0 where there is no label."""

    objective: Tensor
    """(n,) fp32: c (CE + z_loss log^2 Z)."""
    cross_entropy: Tensor
    """(n,) fp32: CE."""
    scale: Tensor | None
    """(n, 1) fp32: a factor of the gradient that is left out in the logits, since the rows of a
    product are shorter. None: there is none."""


def token_losses(
    logits: Tensor, labels: Tensor, *, z_loss: float, by_confidence: bool, gradient: bool
) -> TokenLosses:
    """Return the losses of n tokens, and overwrite the logits.

    With p = softmax(logits), Z its normaliser and c = max p where `by_confidence`, else 1, the
    gradient of a token's objective is c ((1 + 2 z_loss log Z) p - onehot(label)): c is a constant.

    Args:
        logits: (n, vocab), any float dtype. Afterwards the gradient, but for `scale`; of no meaning
            without `gradient`.
        labels: (n,) int64; IGNORE_INDEX has no loss and no gradient.
        z_loss: Weight of log^2 Z.
        by_confidence: See above.
        gradient: Whether it is asked for.
    """
    if logits.is_cuda:
        weight = torch.full((), z_loss, device=logits.device)
        compiled = _compiled(fused_token_losses)
        found = compiled(*_any_rows(logits, labels), weight, by_confidence, gradient)
        return TokenLosses(found[0], found[1], None)
    if logits.dtype == torch.float32:
        return _token_losses_in_place(logits, labels, z_loss, by_confidence, gradient)
    objectives, cross_entropies = [], []
    for low, some in _blocks(logits, labels):
        block = low.float()
        losses = _token_losses_in_place(block, some, z_loss, by_confidence, gradient)
        if losses.scale is not None:
            low.copy_(block.mul_(losses.scale))
        objectives.append(losses.objective)
        cross_entropies.append(losses.cross_entropy)
    return TokenLosses(torch.cat(objectives), torch.cat(cross_entropies), None)


def _token_losses_in_place(
    logits: Tensor, labels: Tensor, z_loss: float, by_confidence: bool, gradient: bool
) -> TokenLosses:
    """Do `token_losses` in fp32: four passes over the logits, five with a z_loss."""
    has_loss = (labels != IGNORE_INDEX).unsqueeze(-1)
    target = labels.unsqueeze(-1).clamp(min=0)
    at_target = logits.gather(-1, target)
    largest, total = torch.empty_like(at_target), torch.empty_like(at_target)
    for block, m, s in _blocks(logits, largest, total):
        torch.amax(block, -1, keepdim=True, out=m)
        torch.sum(block.sub_(m).exp_(), -1, keepdim=True, out=s)
    # The logits are p * total now.
    log_normaliser = total.log().add_(largest)
    cross_entropy = (log_normaliser - at_target).masked_fill_(~has_loss, 0.0)
    objective = cross_entropy
    if z_loss:
        objective = objective + has_loss * (z_loss * log_normaliser**2)
    if by_confidence:
        objective = objective / total
    scale = None
    if gradient:
        if z_loss:
            for block, slope in _blocks(logits, 1.0 + 2.0 * z_loss * log_normaliser):
                block.mul_(slope)
        logits.scatter_add_(-1, target, -total)
        scale = has_loss / (total**2 if by_confidence else total)
    return TokenLosses(objective.squeeze(-1), cross_entropy.squeeze(-1), scale)


def fused_token_losses(
    logits: Tensor, labels: Tensor, z_loss: Tensor, by_confidence: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Do `token_losses` in a form for one kernel, with nothing left out of the gradient.

    z_loss is a tensor, scalar fp32, so that one compilation is for all its values.
    """
    has_loss = (labels != IGNORE_INDEX).unsqueeze(-1)
    x = logits.float()
    largest = x.amax(-1, keepdim=True)
    total = (x - largest).exp().sum(-1, keepdim=True)
    log_normaliser = largest + total.log()
    # A sum rather than a gather, which would be a kernel of its own.
    is_target = torch.arange(x.shape[-1], device=x.device) == labels.unsqueeze(-1)
    at_target = torch.where(is_target, x, 0.0).sum(-1, keepdim=True)
    cross_entropy = torch.where(has_loss, log_normaliser - at_target, 0.0)
    factor = has_loss / total if by_confidence else has_loss.float()
    penalty = torch.where(has_loss, z_loss * log_normaliser**2, 0.0)
    objective = factor * (cross_entropy + penalty)
    if gradient:
        p = (x - log_normaliser).exp()
        logits.copy_(factor * ((1.0 + 2.0 * z_loss * log_normaliser) * p - is_target.float()))
    return objective.squeeze(-1), cross_entropy.squeeze(-1)


def token_divergences(
    teacher: Tensor, student: Tensor, has_loss: Tensor, temperature: float
) -> Tensor:
    """Return T^2 KL(softmax(z / T) || softmax(z_k / T)) of n tokens; overwrite z_k by its gradient.

    That is T (softmax(z_k / T) - softmax(z / T)).

    Args:
        teacher: z, (n, vocab), any float dtype.
        student: z_k, likewise.
        has_loss: (n,) bool; elsewhere divergence and gradient are 0.
        temperature: T.

    Returns:
        (n,) fp32.
    """
    scalar = torch.full((), temperature, device=teacher.device)
    if teacher.is_cuda:
        compiled = _compiled(fused_token_divergences)
        divergences: Tensor = compiled(*_any_rows(teacher, student, has_loss), scalar)
        return divergences
    blocks = _blocks(teacher, student, has_loss)
    return torch.cat([fused_token_divergences(z, z_k, some, scalar) for z, z_k, some in blocks])


def fused_token_divergences(
    teacher: Tensor, student: Tensor, has_loss: Tensor, temperature: Tensor
) -> Tensor:
    """Do `token_divergences` in a form for few kernels; the temperature is a scalar in fp32."""
    has_loss = has_loss.unsqueeze(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    log_q = (student.float() / temperature).log_softmax(-1)
    p = log_p.exp()
    divergence = torch.where(has_loss, p * (log_p - log_q), 0.0).sum(-1)
    student.copy_(torch.where(has_loss, (log_q.exp() - p) * temperature, 0.0))
    return divergence * temperature**2


def _blocks(first: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Split a chunk of logits, (n, vocab), and what belongs to its rows into blocks of rows."""
    rows, vocab_size = first.shape
    in_cache = torch.get_num_threads() * _BLOCK_ELEMENTS // vocab_size
    size = max(in_cache, -(-rows // _MOST_BLOCKS), 1)
    return list(zip(*(each.split(size) for each in (first, *others)), strict=True))


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def _any_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Let one compilation do for all numbers of rows: the last chunk of a batch has fewer."""
    for each in tensors:
        torch._dynamo.maybe_mark_dynamic(each, 0)
    return tensors
