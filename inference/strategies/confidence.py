"""How sure an exit is of its token."""

from torch import Tensor


def softmax_gap(logits: Tensor) -> Tensor:
    """Return p_1 - p_2 of the two most probable tokens, (...), for logits: (..., vocab)."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]
