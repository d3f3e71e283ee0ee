"""One layer of the Llama: attention, feed-forward and their norms."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import LlamaConfig
from models.document_mask import attend
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

    def at(self, positions: Tensor) -> tuple[Tensor, Callable[[int], LayerKV]]:
        """Open the cache for tokens at `positions`: (batch, seq) int64.

        Returns:
            The attention mask, (batch, 1, seq, slots) bool, True where a query attends, and a
            function from layer index l to that layer's storage.
        """
        ...


def open_cache(
    cache: KVCache | None, positions: Tensor | None
) -> tuple[Tensor | None, Callable[[int], LayerKV] | None]:
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
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

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
            q = self.queries(x, cos, sin)
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

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return q, rotated, (batch, heads, seq, head_dim), of x: (batch, seq, dim)."""
        return apply_rope(self.split(self.wq(x)), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return k, rotated, and v, (batch, kv_heads, seq, head_dim), of x: (batch, seq, dim)."""
        return apply_rope(self.split(self.wk(x)), cos, sin), self.split(self.wv(x))

    def split(self, x: Tensor) -> Tensor:
        """Turn (batch, seq, heads * head_dim) into (batch, heads, seq, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x: (batch, seq, dim) token by token."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: x_{l+1} = x_l + f_l(x_l), attention then feed-forward, each pre-normed."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
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
            x = self.attention_norm(h)
            own = gather_tokens(h, query_positions)
            own = own + self.attention(x, cos, sin, mask, kv, query_positions)
            own = own + self.feed_forward(self.ffn_norm(own))
            return h.scatter(1, query_positions.unsqueeze(-1).expand_as(own), own)
        if attend:
            h = h + self.attention(self.attention_norm(h), cos, sin, mask, kv)
        return h + self.feed_forward(self.ffn_norm(h)) if feed else h


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens of x: (batch, seq, width) at positions: (batch, n) int64."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
