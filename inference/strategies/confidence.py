"""Confidence measures: how sure an exit is of its token, from its logits alone."""

from torch import Tensor


def softmax_gap(logits: Tensor) -> Tensor:
    """Return p_1 - p_2 of the two most probable tokens, (...), for logits: (..., vocab)."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def top_probability(logits: Tensor) -> Tensor:
    """Return the probability of the most probable token, (...), for logits: (..., vocab)."""
    return logits.float().softmax(-1).amax(-1)
