"""Tokens drawn for each row by settings and a seed of its own, whatever the rows beside it do.

The token after position t is argmax_x log p(x) + g(seed, t, x), with g ~ Gumbel(0, 1) a hash of
its arguments: the exponential race of `sampling.py`, with noise that can be computed again. Drafts
see the same noise, and a drafted token is kept if it is the one that the full model's distribution
gives. The tokens are thus distributed as p, and are a function of prompt, settings and seed alone,
whatever drafts, and however much (drafter-invariant speculative decoding, arXiv 2408.07978).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.engine.sampling import Sampling

_STEP = -0x61C8864680B583EB  # 2^64 / the golden ratio, of splitmix64, as are the next two
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class RowDraw:
    """How the tokens of one row are drawn."""

    sampling: Sampling
    seed: int
    """0 to 2^64 - 1."""


@dataclass(frozen=True)
class RowDraws:
    """How the tokens of each row are drawn."""

    temperatures: Tensor
    """(batch,) fp32, 1 where a row is greedy."""
    sampled: Tensor
    """(batch,) fp32, 1, or 0 where a row is greedy."""
    top_k: Tensor | None
    """(batch,) int64; None: no row has a filter."""
    top_p: Tensor | None
    """(batch,) fp32; None: no row has a filter."""
    seeds: Tensor
    """(batch,) int64."""

    @classmethod
    def of(cls, rows: Sequence[RowDraw | None], device: torch.device) -> "RowDraws | None":
        """Return the draws of these rows, None standing for a row of no interest.

        Returns:
            None if all rows are greedy: no noise is needed.
        """
        draws = [row if row and row.sampling.temperature else None for row in rows]
        if not any(draws):
            return None

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        top_k = [(row and row.sampling.top_k) or 2**62 for row in draws]
        top_p = [(row and row.sampling.top_p) or 1.0 for row in draws]
        filtered = min(top_k) < 2**62 or min(top_p) < 1.0
        seeds = [row.seed - 2**64 * (row.seed >= 2**63) if row else 0 for row in draws]
        return cls(
            column([row.sampling.temperature if row else 1.0 for row in draws], torch.float32),
            column([1.0 if row else 0.0 for row in draws], torch.float32),
            column(top_k, torch.int64) if filtered else None,
            column(top_p, torch.float32) if filtered else None,
            column(seeds, torch.int64),
        )

    def scores(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Return what is largest at the token drawn; of a greedy row the logits.

        Args:
            logits: (batch, seq, vocab), any float dtype.
            positions: (batch, seq) int64, of the tokens that the drawn ones follow.

        Returns:
            (batch, seq, vocab) fp32.
        """
        scaled = logits.float() / self.temperatures[:, None, None]
        if self.top_k is not None and self.top_p is not None:
            scaled = _keep_most_probable(scaled, self.top_k, self.top_p)
        noise = gumbel(self.seeds[:, None], positions, logits.shape[-1])
        return scaled + noise * self.sampled[:, None, None]


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return Gumbel(0, 1) noise, a hash of seed, position and token.

    Args:
        seeds: (batch, 1) int64.
        positions: (batch, seq) int64.
        vocab_size: Number of tokens.

    Returns:
        (batch, seq, vocab) fp32, finite.
    """
    keys = _mix(_mix(seeds) ^ _mix(positions * _STEP + 1))
    tokens = torch.arange(1, vocab_size + 1, device=keys.device) * _STEP
    bits = _logical_shift(_mix(keys.unsqueeze(-1) + tokens), 12)  # 52 of them
    uniform = (bits.double() + 0.5) * 2.0**-52  # in (0, 1), its ends left out
    return uniform.log_().neg_().log_().neg_().float()


def _mix(x: Tensor) -> Tensor:
    """Return the finalizer of splitmix64, (...) int64 with wrapping products."""
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _keep_most_probable(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return logits: (batch, seq, vocab), -inf where `draw_weights` would filter a token out."""
    ordered, index = scaled.sort(dim=-1, descending=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    ordered = torch.where(rank < top_k[:, None, None], ordered, -torch.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    p = top_p[:, None, None]
    # 1 keeps all, though a sum of fp32 may reach it early.
    ordered = torch.where((before < p) | (p >= 1.0), ordered, -torch.inf)
    return torch.empty_like(scaled).scatter_(-1, index, ordered)
