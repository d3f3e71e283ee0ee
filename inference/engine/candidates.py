"""Several candidates for each drafted token: how they are drawn, and which of them are kept.

Recursive rejection sampling without replacement (arXiv 2402.14160, algorithm 2). Nothing here waits
for the device.
"""

import torch
from torch import Tensor

from inference.engine.sampling import leading, race, sample


def draw_candidates(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw `count` tokens without replacement, the first as `sample` does; (..., count) int64.

    The order of the exponential race is one of draws without replacement. Without a generator: the
    largest weights, in order.
    """
    return race(weights, generator).topk(count, dim=-1).indices


def accept_candidates(
    candidates: Tensor,
    q: Tensor | None,
    p: Tensor,
    generator: torch.Generator | None,
    lengths: Tensor | None = None,
    *,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the longest accepted prefix of a draft with several candidates for each token.

    `accept`, where a rejected x_i is followed by the next candidate of its position, drawn from q_i
    without those before it, and tried against the residual norm(max(0, p_i - q_i)).

    Args:
        candidates: (batch, d, k) int64, see `draw_candidates`; the first of each position is the
            drafted token that the next position follows.
        q: As in `accept`.
        p: As in `accept`, after the drafted tokens.
        generator: As in `accept`.
        lengths: As in `accept`.
        given: (batch,) bool, rows whose first candidates are no draws; the others of each position
            are drawn from q_i without it. None: no row.

    Returns:
        num_accepted: (batch,) int64, how many first candidates are kept, n in 0..d; rank: (batch,)
        int64, the candidate at n that is kept in its stead, 0 for none; and token: (batch,) int64,
        that candidate, or else the draw after the last one kept.
    """
    batch, d, k = candidates.shape
    rows = torch.arange(batch, device=p.device)
    last = torch.full_like(rows, d) if lengths is None else lengths
    if generator is None:
        matches = p[:, :d].argmax(-1, keepdim=True) == candidates
        kept, left = torch.where(matches.any(-1), matches.int().argmax(-1), k), p[:, :d]
    else:
        assert q is not None
        kept, left = _try_in_turn(candidates, q, p[:, :d], generator, given)
    n = leading((kept == 0) & (torch.arange(d, device=p.device) < last[:, None]))
    here, rejected = n.clamp(max=d - 1), n < last
    rank = torch.where(rejected & (kept[rows, here] < k), kept[rows, here], 0)
    drawn = sample(torch.where(rejected[:, None], left[rows, here], p[rows, n]), generator)
    return n, rank, torch.where(rank > 0, candidates[rows, here, rank], drawn)


def acceptance_chances(
    q: Tensor, p: Tensor, count: int, generator: torch.Generator | None
) -> Tensor:
    """Return the chance that each of `count` candidates is accepted, if none before it was.

    Of the first it is sum_x min(p(x), q(x)) (Leviathan et al., arXiv 2211.17192, corollary 3.6); of
    a later one it depends on the rejected ones, which are drawn once. Greedy, without a generator:
    1 or 0.

    Args:
        q: (..., vocab), the draft's `draw_weights`.
        p: (..., vocab), the full model's.
        count: Candidates.
        generator: Source of the draws.

    Returns:
        (..., count) fp32 or fp64.
    """
    if generator is None:
        best = q.argmax(-1, keepdim=True) if count == 1 else q.topk(count, dim=-1).indices
        return (best == p.argmax(-1, keepdim=True)).float()
    chances = [torch.minimum(p, q).sum(-1)]
    while len(chances) < count:
        rejected = sample((q - p).clamp_min(0.0), generator)
        p, q = _residual(p, q), _without(q, rejected[..., None])
        chances.append(torch.minimum(p, q).sum(-1))
    return torch.stack(chances, dim=-1)


def _try_in_turn(
    candidates: Tensor,
    q: Tensor,
    p: Tensor,
    generator: torch.Generator,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the first candidate kept at each position, k for none, and what is left of p then.

    Args:
        candidates: (batch, d, k) int64.
        q: (batch, d, vocab).
        p: (batch, d, vocab).
        generator: Source of the draws.
        given: See `accept_candidates`.

    Returns:
        (batch, d) int64, and (batch, d, vocab).
    """
    k = candidates.shape[2]
    kept, left = torch.full_like(candidates[..., 0], k), p
    for j in range(k):
        x, q_j = candidates[..., j : j + 1], q
        if j == 0 and given is not None:
            # A token that is not drawn has all the weight of its distribution.
            q_j = torch.where(given[:, None, None], torch.zeros_like(q).scatter(-1, x, 1.0), q)
        p_x, q_x = left.gather(-1, x).squeeze(-1), q_j.gather(-1, x).squeeze(-1)
        u = p_x.clone().uniform_(generator=generator)
        # A candidate of no weight was not drawn: there were fewer than k.
        taken = (u * q_x < p_x) & (q_x > 0.0)
        kept = torch.where((kept == k) & taken, j, kept)
        left, q = _residual(left, q_j), _without(q, x)
    return kept, left


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """Return norm(max(0, p - q)), what is left of p after a candidate drawn from q is rejected."""
    residual = (p - q).clamp_min(0.0)
    mass = residual.sum(-1, keepdim=True)
    return torch.where(mass > 0.0, residual / mass, p)


def _without(q: Tensor, x: Tensor) -> Tensor:
    """Return q without token x: (..., 1), for the next draw."""
    q = q.scatter(-1, x, 0.0)
    return q / q.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
