"""Attention that stays within documents: a token attends to those before it in its own document.

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
    """Which tokens each query of some rows attends to."""

    documents: Tensor | None
    """(batch, seq) int64, the number of each token's document; None: a row is one."""
    mask: "Tensor | BlockMask"
    """(batch, 1, seq or n, seq) bool, True where a query attends; or its blocks."""
    queries: Tensor | None = None
    """(batch, n) int64, token positions of the queries; None: all."""

    def arguments(self, rows: Tensor | None) -> tuple[Any, ...]:
        """Return a block's arguments after cos and sin, for some rows: (kept,) int64; None: all."""
        if rows is None:
            return (self.mask,) if self.queries is None else (self.mask, None, self.queries)
        queries = _pick(self.queries, rows)
        return (self.rows(rows),) if queries is None else (self.rows(rows), None, queries)

    def rows(self, rows: Tensor) -> "Tensor | BlockMask":
        """Return `mask` of some rows: (kept,) int64."""
        if isinstance(self.mask, Tensor):
            return self.mask.index_select(0, rows)
        from torch.nn.attention.flex_attention import BlockMask

        mask = self.mask
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        return BlockMask.from_kv_blocks(
            mask.kv_num_blocks.index_select(0, rows),
            mask.kv_indices.index_select(0, rows),
            mask.full_kv_num_blocks.index_select(0, rows),
            mask.full_kv_indices.index_select(0, rows),
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=_mask_mod(_pick(self.documents, rows), _pick(self.queries, rows)),
            seq_lengths=mask.seq_lengths,
        )


def document_mask(documents: Tensor, *, blocks: bool | None = None) -> DocumentMask:
    """Return the mask of documents: (batch, seq) int64, the number of each token's document.

    Args:
        documents: On the device of the attention.
        blocks: Whether to make blocks; None: on CUDA.
    """
    if blocks is None:
        blocks = documents.is_cuda
    if not blocks:
        same = documents[:, :, None] == documents[:, None, :]
        return DocumentMask(documents, same.tril().unsqueeze(1))
    batch, seq = documents.shape
    make = _flex("create_block_mask", compiled=documents.is_cuda)
    device = str(documents.device)
    mask = make(_mask_mod(documents, None), batch, None, seq, seq, device=device)
    return DocumentMask(documents, mask)


def query_mask(
    queries: Tensor, seq: int, documents: Tensor | None, *, blocks: bool | None = None
) -> DocumentMask:
    """Return the mask of some queries that attend to every token before them.

    Args:
        queries: (batch, n) int64, their token positions.
        seq: Tokens of a row.
        documents: (batch, seq) int64, see `document_mask`; None: a row is one document.
        blocks: Whether to make blocks; None: on CUDA.
    """
    if blocks is None:
        blocks = queries.is_cuda
    batch, n = queries.shape
    mask_mod = _mask_mod(documents, queries)
    if not blocks:
        rows, numbers = (torch.arange(count, device=queries.device) for count in (batch, n))
        keys = torch.arange(seq, device=queries.device)
        mask = mask_mod(rows[:, None, None], None, numbers[:, None], keys)
        return DocumentMask(documents, mask.unsqueeze(1), queries)
    make = _flex("create_block_mask", compiled=queries.is_cuda)
    mask = make(mask_mod, batch, None, n, seq, device=str(queries.device))
    return DocumentMask(documents, mask, queries)


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


def _mask_mod(documents: Tensor | None, queries: Tensor | None) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query if queries is None else queries[b, query]
        if documents is None:
            return position >= key
        return (position >= key) & (documents[b, position] == documents[b, key])

    return mask_mod


@cache
def _flex(name: str, *, compiled: bool) -> Any:
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    return torch.compile(function, dynamic=False) if compiled else function
