"""From logits to tokens: the sampling distribution, one draw, the one acceptance rule.

Greedy decoding has no generator and no distributions: the largest logit is taken. Nothing here
waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less may be infinite, and their distribution NaN."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn from logits; filters apply in the order of the fields."""

    temperature: float = 0.0
    """Divides the logits; 0 is greedy: always the most probable token. Else at least 1e-6."""
    top_k: int | None = None
    """Keep the k most probable tokens; None keeps all."""
    top_p: float | None = None
    """Keep the fewest most probable tokens whose probabilities sum to at least this, in (0, 1];
    None keeps all."""

    def __post_init__(self) -> None:
        problems = []
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            problems.append(
                f"temperature: {self.temperature}, give 0 (greedy) or at least {LEAST_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k: {self.top_k}, give at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p: {self.top_p}, give a number above 0 and at most 1")
        if problems:
            raise ValueError("; ".join(problems))


def draw_weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return what `sample` and `accept` work on: the distribution, filters applied.

    Args:
        logits: (..., vocab), any float dtype.
        sampling: Temperature and filters.

    Returns:
        (..., vocab) fp32 (fp64 for fp64 logits), each row summing to 1; when greedy the logits
        themselves.
    """
    if sampling.temperature == 0.0:
        return logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(dtype) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        top, index = scaled.topk(sampling.top_k, dim=-1)
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, index, top)
    probs = scaled.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, index = probs.sort(dim=-1, descending=True)
        # A token stays while those before it have not yet reached top_p; the first always stays.
        ordered = ordered * (ordered.cumsum(-1) - ordered < sampling.top_p)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw token x with probability proportional to weights: (..., vocab); returns (...) int64.

    argmax_x weights(x) / e(x) with e(x) ~ Exponential(1): the exponential race, which unlike
    torch.multinomial never waits for the device. torch draws no e(x) = 0, so a weight of 0 never
    wins against a positive one. Without a generator the largest weight is taken.
    """
    return race(weights, generator).argmax(-1)


def race(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the race of `sample`, whose order is one of draws; the weights without a generator."""
    if generator is None:
        return weights
    return weights / torch.empty_like(weights).exponential_(generator=generator)


def accept(
    draft_tokens: Tensor,
    q: Tensor | None,
    p: Tensor,
    generator: torch.Generator | None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the longest accepted prefix of a draft and draw the token after it.

    Leviathan et al. (arXiv 2211.17192), algorithm 1. With x_i ~ q_i drafted and u_i ~ U(0, 1):
      n = the first i with u_i >= p_i(x_i) / q_i(x_i), d if there is none;
      next ~ norm(max(0, p_n - q_n)) if n < d, else p_d.
    Then x_0, ..., x_{n-1}, next are distributed as if drawn from p one by one. Greedy, without a
    generator: x_i is accepted exactly when p_i is largest at it, and next is where p_n is largest.

    Args:
        draft_tokens: (batch, d) int64, x_i drawn from q_i.
        q: (batch, d, vocab), the draft's distributions; None when greedy.
        p: (batch, d + 1, vocab), the full model's `draw_weights`.
        generator: Source of the u_i and of the last draw; None when greedy.
        lengths: (batch,) int64, tokens each row drafted; those after them are ignored. None: d.

    Returns:
        num_accepted: (batch,) int64, n in 0..d, and next_token: (batch,) int64.
    """
    d = draft_tokens.shape[1]
    drafted = None
    if lengths is not None:
        drafted = torch.arange(d, device=p.device) < lengths[:, None]  # (batch, d)
    if generator is None:
        best = p.argmax(-1)
        agreed = best[:, :d] == draft_tokens
        num_agreed = leading(agreed if drafted is None else agreed & drafted)
        return num_agreed, best.gather(1, num_agreed[:, None]).squeeze(1)
    assert q is not None
    if drafted is not None:
        q = q * drafted.unsqueeze(-1)
    p_x = p[:, :d].gather(-1, draft_tokens.unsqueeze(-1)).squeeze(-1)  # (batch, d)
    q_x = q.gather(-1, draft_tokens.unsqueeze(-1)).squeeze(-1)
    u = p_x.clone().uniform_(generator=generator)
    accepted = u * q_x < p_x
    num_accepted = leading(accepted if drafted is None else accepted & drafted)
    rows = torch.arange(len(p), device=p.device)
    p_n = p[rows, num_accepted]  # (batch, vocab)
    # q_d = 0, also where a shorter draft ends: after one accepted whole the residual is p itself.
    q_n = F.pad(q, (0, 0, 0, 1))[rows, num_accepted]
    residual = (p_n - q_n).clamp_min(0.0)
    # A rejection has p_n(x) < q_n(x), so some other token has p_n > q_n, unless rounding ate it.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0.0, residual, p_n)
    return num_accepted, sample(residual, generator)


def leading(flags: Tensor) -> Tensor:
    """Return how many flags are True before the first that is not, (batch,) of (batch, d)."""
    return flags.long().cumprod(-1).sum(-1)
