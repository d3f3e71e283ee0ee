"""Attention that stays within documents: each token sees those before it in its own document.

On GPUs the mask is FlexAttention's, which skips the blocks between documents (torch.compile makes
its kernel once); elsewhere it is a tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class DocumentMask:
    """Which tokens each token of some rows sees."""

    documents: Tensor
    """(batch, seq) int64, the number of each token's document."""
    seen: "Tensor | BlockMask"
    """(batch, 1, seq, seq) bool, True where a query may look; or its blocks."""

    def rows(self, rows: Tensor) -> "Tensor | BlockMask":
        """Return `seen` of some rows: (kept,) int64."""
        if isinstance(self.seen, Tensor):
            return self.seen.index_select(0, rows)
        from torch.nn.attention.flex_attention import BlockMask

        seen = self.seen
        assert seen.full_kv_num_blocks is not None
        assert seen.full_kv_indices is not None
        return BlockMask.from_kv_blocks(
            seen.kv_num_blocks.index_select(0, rows),
            seen.kv_indices.index_select(0, rows),
            seen.full_kv_num_blocks.index_select(0, rows),
            seen.full_kv_indices.index_select(0, rows),
            BLOCK_SIZE=seen.BLOCK_SIZE,
            mask_mod=_sees(self.documents.index_select(0, rows)),
            seq_lengths=seen.seq_lengths,
        )


def document_mask(documents: Tensor, *, blocks: bool | None = None) -> DocumentMask:
    """Return the mask of documents: (batch, seq) int64, the number of each token's document.

    Args:
        documents: Where it is, attention is.
        blocks: Make blocks; where not given, on CUDA.
    """
    if blocks is None:
        blocks = documents.is_cuda
    if not blocks:
        same = documents[:, :, None] == documents[:, None, :]
        return DocumentMask(documents, same.tril().unsqueeze(1))
    batch, seq = documents.shape
    make = _flex("create_block_mask", compiled=documents.is_cuda)
    device = str(documents.device)
    return DocumentMask(documents, make(_sees(documents), batch, None, seq, seq, device=device))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None", *, grouped: bool
) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v under a mask; None is causal.

    Args:
        q: (batch, heads, seq, head_dim).
        k: (batch, kv_heads, slots, head_dim).
        v: As k.
        mask: (batch, 1, seq, slots) bool, or blocks.
        grouped: Whether heads share keys and values.
    """
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    # Where the block around it is being compiled, this is compiled with it.
    flex = _flex("flex_attention", compiled=q.is_cuda and not torch.compiler.is_compiling())
    out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out


def _sees(documents: Tensor) -> Callable[..., Tensor]:
    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return sees


@cache
def _flex(name: str, *, compiled: bool) -> Any:
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    return torch.compile(function, dynamic=False) if compiled else function
