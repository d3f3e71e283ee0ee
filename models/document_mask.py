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

    documents: Tensor | None
    """(batch, seq) int64, the number of each token's document; None: a row is one."""
    seen: "Tensor | BlockMask"
    """(batch, 1, seq or n, seq) bool, True where a query may look; or its blocks."""
    queries: Tensor | None = None
    """(batch, n) int64, the places of the tokens that look; None: all."""

    def arguments(self, rows: Tensor | None) -> tuple[Any, ...]:
        """Return what a block takes after cos and sin, for some rows: (kept,) int64; None: all."""
        if rows is None:
            return (self.seen,) if self.queries is None else (self.seen, None, self.queries)
        queries = _pick(self.queries, rows)
        return (self.rows(rows),) if queries is None else (self.rows(rows), None, queries)

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
            mask_mod=_sees(_pick(self.documents, rows), _pick(self.queries, rows)),
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
    seen = make(_sees(documents, None), batch, None, seq, seq, device=device)
    return DocumentMask(documents, seen)


def query_mask(
    queries: Tensor, seq: int, documents: Tensor | None, *, blocks: bool | None = None
) -> DocumentMask:
    """Return the mask of some tokens that look at all before them.

    Args:
        queries: (batch, n) int64, their places in their rows.
        seq: Tokens of a row.
        documents: (batch, seq) int64, see `document_mask`; None: a row is one document.
        blocks: Make blocks; where not given, on CUDA.
    """
    if blocks is None:
        blocks = queries.is_cuda
    batch, n = queries.shape
    sees = _sees(documents, queries)
    if not blocks:
        rows, places = (torch.arange(count, device=queries.device) for count in (batch, n))
        keys = torch.arange(seq, device=queries.device)
        seen = sees(rows[:, None, None], None, places[:, None], keys)
        return DocumentMask(documents, seen.unsqueeze(1), queries)
    make = _flex("create_block_mask", compiled=queries.is_cuda)
    seen = make(sees, batch, None, n, seq, device=str(queries.device))
    return DocumentMask(documents, seen, queries)


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


def _pick(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values.index_select(0, rows)


def _sees(documents: Tensor | None, queries: Tensor | None) -> Callable[..., Tensor]:
    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query if queries is None else queries[b, query]
        if documents is None:
            return place >= key
        return (place >= key) & (documents[b, place] == documents[b, key])

    return sees


@cache
def _flex(name: str, *, compiled: bool) -> Any:
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    return torch.compile(function, dynamic=False) if compiled else function
