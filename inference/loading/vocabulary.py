"""Ids that a model has and its tokenizer has not: no exit predicts them.

A vocabulary is padded to a multiple, or a tokenizer.json numbers its tokens with gaps. Every
strategy, and every measurement, reads logits through the one head, so that drafts and verification
are masked alike and decoding stays lossless over the ids that exist.
"""

from collections.abc import Container

import torch
from torch import Tensor

from models.llama import Llama


class MaskedHead:
    """A stand-in for `Llama.head` whose logits are -inf at ids without a piece."""

    def __init__(self, model: Llama, missing: Tensor) -> None:
        self._head, self.missing = model.head, missing

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits, (..., vocab), for the output of `before_head`: (..., dim)."""
        return self._head(x).index_fill_(-1, self.missing, -torch.inf)


def mask_missing(model: Llama, ids: Container[int]) -> None:
    """Mask the head of a model, in place, at all ids but these; with none left out, leave it."""
    missing = [i for i in range(model.config.vocab_size) if i not in ids]
    if missing:
        tensor = torch.tensor(missing, device=model.norm.weight.device)
        model.head = MaskedHead(model, tensor)  # type: ignore[method-assign]


def missing_ids(model: Llama) -> list[int]:
    """Return the ids that a model's head is masked at."""
    return model.head.missing.tolist() if isinstance(model.head, MaskedHead) else []
