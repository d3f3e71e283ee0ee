"""Attention that stays within documents, and within a sliding window of the tokens before.

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

_BLOCK = 128
"""Queries, and keys, of a block: FlexAttention's default."""
GRAPHS = 64
"""Most graphs of a compiled function: several for each shape of a batch but its rows."""


def allow_graphs() -> None:
    """Raise torch's limit of recompilations of a function to GRAPHS."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)


@dataclass(frozen=True)
class AttentionMask:
    """Which tokens each query of some rows attends to."""

    documents: Tensor | None
    """(batch, seq) int64, the number of each token's document; None: a row is one."""
    mask: "Tensor | BlockMask"
    """(batch or 1, 1, seq or n, seq) bool, True where a query attends; or its blocks."""
    queries: Tensor | None = None
    """(batch, n) int64, token positions of the queries; None: all."""
    window: int | None = None
    """Tokens that a query attends to at most; None: all before it."""

    def arguments(self, rows: Tensor | None) -> tuple[Any, ...]:
        """Return a block's arguments after cos and sin, for some rows: (kept,) int64; None: all."""
        if rows is None:
            return (self.mask,) if self.queries is None else (self.mask, None, self.queries)
        queries = _pick(self.queries, rows)
        return (self.rows(rows),) if queries is None else (self.rows(rows), None, queries)

    def rows(self, rows: Tensor) -> "Tensor | BlockMask":
        """Return `mask` of some rows: (kept,) int64."""
        if self.documents is None and self.queries is None:
            return self.mask  # the same in every row
        if isinstance(self.mask, Tensor):
            return self.mask.index_select(0, rows)
        from torch.nn.attention.flex_attention import BlockMask

        mask = self.mask
        # The blocks of each query and of each key; `from_kv_blocks` would work the latter out anew.
        blocks = (getattr(mask, name).index_select(0, rows) for name in _BLOCKS)
        return BlockMask(
            **dict(zip(_BLOCKS, blocks, strict=True)),
            seq_lengths=mask.seq_lengths,
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=_mask_mod(_pick(self.documents, rows), _pick(self.queries, rows), self.window),
        )


_BLOCKS = tuple(
    f"{part}{of}_{what}"
    for part in ("", "full_")
    for of in ("kv", "q")
    for what in ("num_blocks", "indices")
)


def document_mask(
    documents: Tensor, window: int | None = None, *, blocks: bool | None = None
) -> AttentionMask:
    """Return the mask of documents: (batch, seq) int64, the number of each token's document.

    Args:
        documents: On the device of the attention.
        window: Tokens that a query attends to at most, itself the last; None: all before it.
        blocks: Whether to make blocks; None: on CUDA.
    """
    batch, seq = documents.shape
    mask = _make(_mask_mod(documents, None, window), batch, seq, seq, documents.device, blocks)
    return AttentionMask(documents, mask, window=window)


def window_mask(
    window: int, seq: int, device: torch.device, *, blocks: bool | None = None
) -> AttentionMask:
    """Return the mask of a sliding window over `seq` tokens of any rows, see `document_mask`."""
    mask = _make(_mask_mod(None, None, window), 1, seq, seq, device, blocks)
    return AttentionMask(None, mask, window=window)


def query_mask(
    queries: Tensor,
    seq: int,
    documents: Tensor | None,
    window: int | None = None,
    *,
    blocks: bool | None = None,
) -> AttentionMask:
    """Return the mask of some queries that attend to every token before them.

    Args:
        queries: (batch, n) int64, their token positions.
        seq: Tokens of a row.
        documents: (batch, seq) int64, see `document_mask`; None: a row is one document.
        window: See `document_mask`.
        blocks: Whether to make blocks; None: on CUDA.
    """
    batch, n = queries.shape
    mask_mod = _mask_mod(documents, queries, window)
    mask = _make(mask_mod, batch, n, seq, queries.device, blocks)
    return AttentionMask(documents, mask, queries, window)


def slots_mask(positions: Tensor, slots: int, window: int | None = None) -> "BlockMask":
    """Return the mask of some queries over the slots of a KV cache, as blocks, none left out.

    Compiled, FlexAttention splits the slots of a few queries over a GPU's multiprocessors; under a
    tensor as mask, torch's attention takes one of these for each head, however long the text.

    Args:
        positions: (batch, n) int64, of the queries; they attend to the slots up to these.
        slots: Their number.
        window: See `document_mask`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, n = positions.shape
    numbers = torch.arange(-(-slots // _BLOCK), dtype=torch.int32, device=positions.device)
    return BlockMask.from_kv_blocks(
        torch.full_like(positions[:, :1, None], len(numbers), dtype=torch.int32),
        numbers.expand(batch, 1, 1, -1),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_mask_mod(None, positions, window),
        seq_lengths=(n, slots),
        compute_q_blocks=False,
    )


def _make(
    mask_mod: Callable[..., Tensor],
    batch: int,
    queries: int,
    seq: int,
    device: torch.device,
    blocks: bool | None,
) -> "Tensor | BlockMask":
    """Return the mask of a rule, as blocks or as (batch, 1, queries, seq) bool."""
    on_gpu = device.type == "cuda"
    if blocks or (blocks is None and on_gpu):
        make = _flex("create_block_mask", compiled=on_gpu)
        blocked: BlockMask = make(mask_mod, batch, None, queries, seq, device=str(device))
        return blocked
    rows, numbers, keys = (torch.arange(count, device=device) for count in (batch, queries, seq))
    dense = mask_mod(rows[:, None, None], None, numbers[:, None], keys)
    return dense.expand(batch, queries, seq).unsqueeze(1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None", *, grouped: bool
) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v under a mask; None is causal.

    Args:
        q: (batch, heads, seq, head_dim).
        k: (batch, kv_heads, slots, head_dim).
        v: As k.
        mask: (batch or 1, 1, seq, slots) bool, or blocks.
        grouped: Whether heads share keys and values.
    """
    if isinstance(mask, Tensor) and grouped and q.is_cuda:
        return _attend_by_group(q, k, v, mask)
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    if q.is_cuda and not torch.compiler.is_compiling():
        flex = _flex("flex_attention", compiled=True)
    else:  # Where the block around it is being compiled, this is compiled with it.
        from torch.nn.attention.flex_attention import flex_attention as flex
    out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out


def _attend_by_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Do `attend` with the queries of the heads that share keys and values as one head's.

    With a mask, torch (2.11, 2.13) has no fast CUDA kernel for shared heads but cuDNN's, of
    bfloat16 on some GPUs; the rest would repeat keys and values and hold whole scores.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    together = q.reshape(batch, kv_heads, -1, head_dim)
    # Of one query, as in decoding, a view.
    masks = mask.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(together, k, v, attn_mask=masks)
    return out.reshape(q.shape)


def _pick(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values.index_select(0, rows)


def _mask_mod(
    documents: Tensor | None, queries: Tensor | None, window: int | None
) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query if queries is None else queries[b, query]
        attends = position >= key
        if window is not None:
            attends = attends & (position - key < window)
        if documents is None:
            return attends
        return attends & (documents[b, position] == documents[b, key])

    return mask_mod


@cache
def _flex(name: str, *, compiled: bool) -> Any:
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    if not compiled:
        return function
    # Stochastic depth changes the number of rows: the second number makes a kernel for any. At the
    # limit of recompilations torch would go on without a kernel, at the cost of whole scores.
    allow_graphs()
    return torch.compile(function, dynamic=None if name == "flex_attention" else False)
