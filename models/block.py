"""One layer of the Llama: attention, feed-forward and their norms."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention_mask import attend
from models.config import LlamaConfig
from models.rope import apply_rope

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class LayerKV(Protocol):
    """Where one attention layer keeps its keys and values while decoding."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v: (batch, kv_heads, seq, head_dim); return all keys and values to read."""
        ...


class KVCache(Protocol):
    """Keys and values of every layer, and which of them each query attends to."""

    def at(self, positions: Tensor) -> "tuple[Tensor | BlockMask, Callable[[int], LayerKV]]":
        """Open the cache for tokens at `positions`: (batch, seq) int64.

        Returns:
            The attention mask, (batch, 1, seq, slots) bool, True where a query attends, or its
            blocks, and a function from layer index l to that layer's storage.
        """
        ...


def open_cache(
    cache: KVCache | None, positions: Tensor | None
) -> "tuple[Tensor | BlockMask | None, Callable[[int], LayerKV] | None]":
    """Return what `KVCache.at` returns; without a cache, no mask and no storage."""
    if cache is None:
        return None, None
    assert positions is not None, "decoding with a cache needs positions"
    return cache.at(positions)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight, shape and dtype of x; computed in fp32 at least."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_width
        self.grouped = config.n_kv_heads != config.n_heads
        width, kv_width = (n * self.head_dim for n in (config.n_heads, config.n_kv_heads))
        bias = config.attention_bias != "none"
        self.wq = nn.Linear(config.dim, width, bias=bias)
        self.wk = nn.Linear(config.dim, kv_width, bias=bias)
        self.wv = nn.Linear(config.dim, kv_width, bias=bias)
        self.wo = nn.Linear(width, config.dim, bias=config.attention_bias == "qkvo")
        self.qk_norm = config.qk_norm
        if self.qk_norm == "head":
            width = kv_width = self.head_dim
        normed = self.qk_norm != "none"
        self.q_norm = RMSNorm(width, config.norm_eps) if normed else None
        self.k_norm = RMSNorm(kv_width, config.norm_eps) if normed else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: "Tensor | BlockMask | None",
        kv: LayerKV | None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Attend within x: (batch, seq, dim), and to `kv` where it is given.

        With `query_positions`, (batch, n) int64, the tokens at those positions alone have queries.
        """
        if query_positions is None:
            q, k, v = self.project(x, cos, sin)
        else:
            own_cos, own_sin = (
                gather_tokens(each[:, 0].expand(len(x), -1, -1), query_positions).unsqueeze(1)
                for each in (cos, sin)
            )
            q = self.queries(gather_tokens(x, query_positions), own_cos, own_sin)
            k, v = self.keys_and_values(x, cos, sin)
        if kv is not None:
            k, v = kv.update(k, v)
        out = attend(q, k, v, mask, grouped=self.grouped)
        b, _, s, _ = q.shape
        return self.wo(out.transpose(1, 2).reshape(b, s, self.n_heads * self.head_dim))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `queries` and `keys_and_values` do."""
        return (self.queries(x, cos, sin), *self.keys_and_values(x, cos, sin))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return q, rotated, (batch, heads, seq, head_dim), of x: (batch, seq, dim)."""
        return apply_rope(self.split(self.wq(x), self.q_norm), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return k, rotated, and v, (batch, kv_heads, seq, head_dim), of x: (batch, seq, dim)."""
        k = self.split(self.wk(x), self.k_norm)
        return apply_rope(k, cos, sin), self.split(self.wv(x))

    def split(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Turn (batch, seq, heads * head_dim) into (batch, heads, seq, head_dim), normed."""
        if norm is not None and self.qk_norm == "full":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.qk_norm == "head":
            x = norm(x)
        return x.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x: (batch, seq, dim) token by token."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: x_{l+1} = x_l + f_l(x_l), attention then feed-forward.

    Each part is normed, before it or, with norm_position "post", after it.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: "Tensor | BlockMask | None" = None,
        kv: LayerKV | None = None,
        query_positions: Tensor | None = None,
        *,
        attend: bool = True,
        feed: bool = True,
    ) -> Tensor:
        """Map h: (batch, seq, dim) to the next layer's input, same shape.

        With `query_positions`, (batch, n) int64, ascending, the tokens at those positions alone
        run; the others have keys and values, and pass unchanged. Without `attend` or `feed`, that
        part adds nothing.
        """
        if query_positions is not None:
            own = gather_tokens(h, query_positions)
            own = own + self.attention_part(h, cos, sin, mask, kv, query_positions)
            own = own + self.feed_forward_part(own)
            return h.scatter(1, query_positions.unsqueeze(-1).expand_as(own), own)
        if attend:
            h = h + self.attention_part(h, cos, sin, mask, kv)
        return h + self.feed_forward_part(h) if feed else h

    def attention_part(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: "Tensor | BlockMask | None",
        kv: LayerKV | None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Return what attention adds to h, see `Attention.forward`."""
        out = self.attention(self.attention_input(h), cos, sin, mask, kv, query_positions)
        return out if self.norm_first else self.attention_norm(out)

    def attention_input(self, h: Tensor) -> Tensor:
        """Return what queries, keys and values are made of, for h: (batch, seq, dim)."""
        return self.attention_norm(h) if self.norm_first else h

    def feed_forward_part(self, h: Tensor) -> Tensor:
        """Return what the feed-forward layer adds to h: (batch, seq, dim)."""
        return feed_forward_part(h, self.ffn_norm, self.feed_forward, self.norm_first)


def feed_forward_part(
    h: Tensor, norm: RMSNorm, feed_forward: FeedForward, norm_first: bool
) -> Tensor:
    """Return what a feed-forward layer adds to h: (..., dim), normed before or after it."""
    return feed_forward(norm(h)) if norm_first else norm(feed_forward(h))


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens of x: (batch, seq, width) at positions: (batch, n) int64."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
