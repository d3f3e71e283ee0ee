"""Routers: small gates, one for each layer, that decide token by token whether the layer runs.

SkipLayer (Learning to Skip for Language Modeling, arXiv 2311.15436); the gates of Dynamic Layer
Selection (arXiv 2410.20022) are MLPs. A token that skips keeps its state, from which the layer
still makes keys and values. Layers l count from 0.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention_mask import AttentionMask, query_mask
from models.config import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a model with routers, see model.router, is trained."""

    capacity: float = 1.0
    """Share of a row's tokens, rounded up, that a layer runs at most in training, above 0 to 1: the
    most probable of the whole row; queries and feed-forward of the others are not computed.
    Validation and decoding have no such limit."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        if not 0.0 < self.capacity <= 1.0:
            return [f"router.capacity: {self.capacity}, must lie in (0, 1]"]
        return []


class Router(nn.Module):
    """The gate of one layer: p = sigmoid(w x + b), x the RMS-normed state or an MLP of it.

    It begins with w = 0 and b = 1: every token runs, with p = 0.73.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        width = config.router_width
        self.hidden = nn.Linear(config.dim, width, bias=False) if width else None
        self.out = nn.Linear(width or config.dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Return the probability that the layer runs, (batch, seq) fp32, for h: (b, seq, dim)."""
        x = F.rms_norm(h, h.shape[-1:], eps=self.eps)
        if self.hidden is not None:
            x = F.silu(self.hidden(x))
        logits: Tensor = self.out(x).squeeze(-1)
        return logits.float().sigmoid()


def runs(p: Tensor) -> Tensor:
    """Return which tokens run a layer, bool, for the probabilities p of any shape."""
    return p > 0.5


def route(h: Tensor, out: Tensor, p: Tensor | None) -> Tensor:
    """Return x_{l+1} = h + w f(h), where out = h + f(h), with w = [p > 0.5] + p - p.detach().

    In value each token's `out` or `h` to the bit; the gradient of p is straight-through.

    Args:
        h: (batch, seq, dim), x_l.
        out: (batch, seq, dim), the layer's output.
        p: (batch, seq), the probability that it runs; None: it always does.
    """
    if p is None:
        return out
    taken = torch.where(runs(p).unsqueeze(-1), out, h)
    if not p.requires_grad:
        return taken
    return taken + (p - p.detach()).unsqueeze(-1).to(h.dtype) * (out - h)


@dataclass
class Routing:
    """The capacity of the routers in one training pass, and their gates."""

    capacity: float = 1.0
    """As in RouterConfig."""
    gates: dict[int, Tensor] = field(default_factory=dict)
    """{l: p of layer l, (batch, seq) fp32}, filled as the layers run."""

    def admit(self, l: int, p: Tensor, documents: AttentionMask | None) -> AttentionMask | None:
        """Record layer l's p, (batch, seq); return the mask whose queries are those admitted."""
        self.gates[l] = p
        if self.capacity == 1.0:
            return documents
        chosen = most_probable(p, self.capacity)
        if documents is None:
            return query_mask(chosen, p.shape[1], None)
        return query_mask(chosen, p.shape[1], documents.documents, documents.window)


def most_probable(p: Tensor, capacity: float) -> Tensor:
    """Return the positions of each row's tokens of highest p, ascending; of equal ones the first.

    Args:
        p: (batch, seq).
        capacity: Share of the row.

    Returns:
        (batch, ceil(capacity * seq)) int64.
    """
    count = math.ceil(round(capacity * p.shape[1], 6))  # 0.07 * 100 is a little over 7
    order = p.detach().argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values
