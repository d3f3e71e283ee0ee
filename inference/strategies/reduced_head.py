"""The LM head over the most frequent tokens alone, for drafts: FR-Spec (arXiv 2502.14856).

A draft over V' tokens reads V' rows of the head, and decoding stays exact, as verification keeps
the whole vocabulary. `inference.frequent_tokens` counts the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from data.foreign_json import read_object, take
from inference.engine.products import PACKED_ELEMENTS, PackedLinear
from inference.loading.vocabulary import missing_ids
from models.llama import Llama

COUNT_THEM = "count them with python -m inference.frequent_tokens and give its file"


@dataclass(frozen=True)
class ReducedHead:
    """The LM head over a part of the vocabulary."""

    tokens: Tensor
    """(part,) int64, ids of that part."""
    linear: Callable[[Tensor], Tensor]
    """Normed states (..., dim) to logits (..., part)."""
    vocab_size: int

    def widen(self, weights: Tensor, nothing: float) -> Tensor:
        """Spread weights: (batch, seq, part) over the whole vocabulary, `nothing` elsewhere."""
        wide = weights.new_full((*weights.shape[:-1], self.vocab_size), nothing)
        return wide.scatter(-1, self.tokens.expand(weights.shape), weights)


def reduced_head(model: Llama, tokens: Tensor) -> ReducedHead:
    """Copy a model's head for some tokens: (part,) int64; packed where the head is packed."""
    weight = model.head_weight.detach()[tokens]
    packed = isinstance(model.lm_head, PackedLinear) and weight.numel() >= PACKED_ELEMENTS
    linear = PackedLinear(weight) if packed else partial(F.linear, weight=weight)
    return ReducedHead(tokens, linear, model.config.vocab_size)


def load_reduced_head(model: Llama, path: Path, part: int) -> ReducedHead:
    """Return the head of the `part` most frequent tokens, by the counts in a file.

    Raises:
        ValueError: The file holds no counts, or not of this vocabulary, or that is smaller.
    """
    try:
        counts = np.array(take(read_object(path), "counts", list[int]), dtype=np.int64)
    except OSError:
        raise ValueError(f"token_counts: there is no {path}, {COUNT_THEM}") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"token_counts: {path} is damaged ({error}), {COUNT_THEM}") from None
    vocab_size = model.config.vocab_size
    if counts.shape != (vocab_size,):
        raise ValueError(
            f"token_counts: {path} counts {counts.size} tokens and the model has {vocab_size}, "
            f"{COUNT_THEM}"
        )
    if part > vocab_size:
        raise ValueError(f"draft_vocab: {part}, give at most this model's {vocab_size} tokens")
    missing = missing_ids(model)
    counts[missing] = -1
    tokens = torch.from_numpy(most_frequent(counts, min(part, vocab_size - len(missing))))
    return reduced_head(model, tokens.to(model.norm.weight.device))


def check_counts(path: Path, tokenizer_fingerprint: str) -> None:
    """Raise a ValueError if a file's counts are of another tokenizer."""
    try:
        fingerprint = take(read_object(path), "tokenizer", str)
    except (OSError, ValueError) as error:
        raise ValueError(f"token_counts: {path} is damaged ({error}), {COUNT_THEM}") from None
    if fingerprint != tokenizer_fingerprint:
        raise ValueError(
            f"token_counts: {path} counts the ids of tokenizer {fingerprint[:12]} and this "
            f"checkpoint has {tokenizer_fingerprint[:12]}, {COUNT_THEM}"
        )


def most_frequent(counts: npt.NDArray[np.int64], part: int) -> npt.NDArray[np.int64]:
    """Return the ids of the `part` largest counts: (vocab,), the largest first."""
    return np.argsort(-counts, kind="stable")[:part]
