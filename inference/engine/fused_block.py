"""The layers of a model in the form they are decoded with: few operations, as large as they can be.

At a few tokens a pass, and in small models most of all, the calls take the time and not the
arithmetic. Queries, keys and values are one product, and so are both inputs of SwiGLU. On a CPU, in
float32, rotary embeddings are one complex product on the spot, and the weights of the layers' norms
are in the matrices behind them. Attention heads are permuted for it, of queries and keys alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.engine.kv_cache import LayerSlots
from inference.engine.products import add_product
from models.attention_mask import attend
from models.block import Attention, FeedForward, RMSNorm, TransformerBlock
from models.rope import apply_rope


class UnitNorm(RMSNorm):
    """A root-mean-square norm whose weight, times sqrt(dim), is in the matrices that read it."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        floor = norm.weight.new_tensor((norm.eps * norm.weight.numel()) ** 0.5)
        self.register_buffer("floor", floor, persistent=False)
        self.floor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(|x|^2 + dim eps), shape of x."""
        return x / torch.linalg.vector_norm(x, 2, -1, True).hypot(self.floor)


class FewCallsNorm(UnitNorm):
    """A root-mean-square norm in four calls, of which torch makes eight."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(norm)
        self.weight = norm.weight
        scale = norm.weight.detach() * norm.weight.numel() ** 0.5
        self.register_buffer("scale", scale, persistent=False)
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight, shape of x."""
        return super().forward(x) * self.scale


class Heads(NamedTuple):
    """One product of tokens with the matrices of queries, keys and values; views of it."""

    product: Tensor
    """(batch * seq, (heads + 2 kv_heads) head_dim)."""
    rotated: Tensor
    """Queries and keys, (batch, seq, heads + kv_heads, head_dim / 2), complex."""
    q: Tensor
    """(batch, heads, seq, head_dim); of one token, (batch, kv_heads, heads / kv_heads, head_dim),
    as the heads that share keys and values are then queries of one."""
    kv: Tensor
    """(batch, seq, 2 kv_heads, head_dim)."""


class FusedAttention(Attention):
    """Attention whose queries, keys and values are one product.

    Args:
        plain: The attention whose weights it takes.
        permute: Order each head so that complex numbers rotate it.
    """

    def __init__(self, plain: Attention, *, permute: bool) -> None:
        nn.Module.__init__(self)
        self.n_heads, self.n_kv_heads = plain.n_heads, plain.n_kv_heads
        self.head_dim, self.grouped, self.qk_norm = plain.head_dim, plain.grouped, plain.qk_norm
        self.q_norm, self.k_norm, self.wo = plain.q_norm, plain.k_norm, plain.wo
        self.permuted = permute
        self._widths = [len(each.weight) for each in (plain.wq, plain.wk, plain.wv)]
        self.wqkv = _fused(plain.wq, plain.wk, plain.wv)
        self.width = sum(self._widths)
        if permute:
            self._permute()

    def _permute(self) -> None:
        """Interleave both halves of every head of queries and keys."""
        rows = torch.arange(sum(self._widths[:2])).view(-1, 2, self.head_dim // 2)
        rows = rows.transpose(1, 2).flatten()
        for tensor in (self.wqkv.weight, self.wqkv.bias):
            if tensor is not None:
                tensor.data[: len(rows)] = tensor.data[rows]

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, see `queries` and `keys_and_values`."""
        q, k, v = self.wqkv(x).split(self._widths, dim=-1)
        q, k = self.split(q, self.q_norm), self.split(k, self.k_norm)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin), self.split(v)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Attention.queries`; computes keys and values too."""
        q = self.wqkv(x).split(self._widths, dim=-1)[0]
        return self._rotate(self.split(q, self.q_norm), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `Attention.keys_and_values`; computes queries too."""
        _, k, v = self.wqkv(x).split(self._widths, dim=-1)
        return self._rotate(self.split(k, self.k_norm), cos, sin), self.split(v)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x: (batch, heads, seq, head_dim); for permuted heads, see `ComplexRotary`."""
        if not self.permuted:
            return apply_rope(x, cos, sin)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * cos).flatten(-2)

    def decode(self, x: Tensor, turns: Tensor, mask: Tensor, kv: LayerSlots) -> Tensor:
        """Return what `wo` reads, (batch * seq, heads * head_dim), for permuted heads.

        Args:
            x: (batch * seq, dim).
            turns: (batch, 1, seq, head_dim / 2), complex, see `ComplexRotary`.
            mask: (batch, 1, seq, window).
            kv: Written to, and attended to.
        """
        batch, seq = kv.shape
        heads = self.cut(self.wqkv(x), batch, seq)
        heads.rotated.mul_(turns.transpose(1, 2))
        kv.write(heads.kv)
        out = attend(heads.q, kv.keys, kv.values, mask, grouped=self.grouped and seq > 1)
        if seq > 1:
            out = out.transpose(1, 2)
        return out.reshape(len(x), -1)

    def cut(self, product: Tensor, batch: int, seq: int) -> Heads:
        """Return the parts of a product of batch * seq tokens, for permuted heads."""
        heads = product.view(batch, seq, -1, self.head_dim)
        turned = heads[:, :, : -self.n_kv_heads].unflatten(-1, (-1, 2))
        q = heads[:, :, : self.n_heads]
        q = q.view(batch, self.n_kv_heads, -1, self.head_dim) if seq == 1 else q.transpose(1, 2)
        return Heads(product, torch.view_as_complex(turned), q, heads[:, :, self.n_heads :])


class FusedFeedForward(FeedForward):
    """SwiGLU whose w1 and w3 are one product."""

    def __init__(self, plain: FeedForward) -> None:
        nn.Module.__init__(self)
        self.w13, self.w2 = _fused(plain.w1, plain.w3), plain.w2
        self.width = 2 * plain.w1.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Transform x: (..., dim) token by token."""
        return self.w2(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """Return what `w2` reads, (..., ffn_dim), for x: (..., dim)."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class Buffers(NamedTuple):
    """Where the products of a pass of one shape go, those of one layer after the other."""

    heads: Heads
    inner: Tensor
    """(batch * seq, 2 ffn_dim)."""
    gate: Tensor
    up: Tensor


class FusedBlock(TransformerBlock):
    """A layer with fused products.

    Args:
        plain: The layer whose weights it takes.
        on_the_spot: The form for a CPU in float32, see the head of this file; its norms lose their
            weights to the matrices where they come before these.
    """

    def __init__(self, plain: TransformerBlock, *, on_the_spot: bool) -> None:
        nn.Module.__init__(self)
        self.norm_first = plain.norm_first
        attention = FusedAttention(plain.attention, permute=on_the_spot)
        feed_forward = FusedFeedForward(plain.feed_forward)
        self.attention_norm, self.ffn_norm = plain.attention_norm, plain.ffn_norm
        if on_the_spot and self.norm_first:
            self.attention_norm = _absorbed(self.attention_norm, attention.wqkv)
            self.ffn_norm = _absorbed(self.ffn_norm, feed_forward.w13)
        self.attention, self.feed_forward = attention, feed_forward

    def decode(
        self, h: Tensor, turns: Tensor, mask: Tensor, kv: LayerSlots, *, attend: bool, feed: bool
    ) -> Tensor:
        """Map h: (batch * seq, dim) to the next layer's input; the rest as in `FusedAttention`."""
        attention, feed_forward = self.attention, self.feed_forward
        assert isinstance(attention, FusedAttention)
        assert isinstance(feed_forward, FusedFeedForward)
        if attend:
            x = attention.decode(self.attention_input(h), turns, mask, kv)
            h = self._add(h, attention.wo, x, self.attention_norm)
        if feed:
            x = feed_forward.inner(self.ffn_norm(h) if self.norm_first else h)
            h = self._add(h, feed_forward.w2, x, self.ffn_norm)
        return h

    def new_buffers(self, batch: int, seq: int) -> Buffers:
        """Return where the products of a pass of this shape may go."""
        attention, feed_forward = self.attention, self.feed_forward
        assert isinstance(attention, FusedAttention)
        assert isinstance(feed_forward, FusedFeedForward)
        product = torch.empty(batch * seq, attention.width, dtype=torch.float32, device="cpu")
        inner = torch.empty(batch * seq, feed_forward.width, dtype=torch.float32, device="cpu")
        gate, up = inner.chunk(2, dim=-1)
        return Buffers(attention.cut(product, batch, seq), inner, gate, up)

    def _add(self, h: Tensor, linear: nn.Module, x: Tensor, norm: RMSNorm) -> Tensor:
        return add_product(h, linear, x) if self.norm_first else h + norm(linear(x))


def _fused(*linears: nn.Linear) -> nn.Linear:
    """Return one linear layer whose output is that of several, one after the other."""
    first, width = linears[0], sum(len(each.weight) for each in linears)
    with torch.device("meta"):
        out = nn.Linear(first.in_features, width, bias=first.bias is not None)
    weight = torch.cat([each.weight for each in linears])
    out.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        bias = torch.cat([each.bias for each in linears])
        out.bias = nn.Parameter(bias, requires_grad=False)
    return out


def _absorbed(norm: RMSNorm, linear: nn.Linear) -> UnitNorm:
    """Multiply a norm's weight into the matrix behind it; return the norm without one."""
    linear.weight.mul_(norm.weight * norm.weight.numel() ** 0.5)
    return UnitNorm(norm)
