"""The loop over fused layers of a model on a CPU, in float32; and `fuse`, which makes them."""

import threading
from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.engine.fused_block import (
    Buffers,
    FewCallsNorm,
    FusedAttention,
    FusedBlock,
    FusedFeedForward,
    UnitNorm,
)
from inference.engine.kv_cache import LayerSlots
from inference.engine.products import TransposedLinear
from models.block import FeedForward, KVCache
from models.layer_masks import NO_MASKS, LayerMasks
from models.llama import NOTHING, Llama, SkippedParts
from models.router import route

_WRITTEN_OUT_TOKENS = 64
"""Most tokens of a pass whose layers are written out; longer ones come once."""

Step = Callable[[Tensor, Tensor, Tensor, LayerSlots], Tensor]
"""From h, turns, mask and kv to the next layer's input, as `FusedBlock.decode`."""


def written_out(block: FusedBlock, to: Buffers) -> Step | None:
    """Return a layer without modules and new tensors between its calls; None if it has other parts.

    Of a small model, calls of Python and of torch's allocator take as long as the arithmetic.
    """
    attention, feed_forward = block.attention, block.feed_forward
    assert isinstance(attention, FusedAttention)
    assert isinstance(feed_forward, FusedFeedForward)
    linears: tuple[nn.Module, ...] = (
        attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2,
    )  # fmt: skip
    parts = [
        linear.transposed
        for linear in linears
        if isinstance(linear, TransposedLinear) and linear.bias is None
    ]
    if len(parts) < 4 or not block.norm_first:
        return None
    wqkv, wo, w13, w2 = parts
    product, rotated, q, kv_heads = to.heads
    inner, gate, up = to.inner, to.gate, to.up
    batch, seq = kv_heads.shape[:2]
    n, grouped = batch * seq, attention.grouped and seq > 1
    assert isinstance(block.attention_norm, UnitNorm)
    assert isinstance(block.ffn_norm, UnitNorm)
    floor, ffn_floor = block.attention_norm.floor, block.ffn_norm.floor
    mm, addmm, norm = torch.mm, torch.addmm, torch.linalg.vector_norm
    attend = F.scaled_dot_product_attention

    def step(h: Tensor, turns: Tensor, mask: Tensor, kv: LayerSlots) -> Tensor:
        mm(h / norm(h, 2, -1, True).hypot(floor), wqkv, out=product)
        rotated.mul_(turns)
        kv.write(kv_heads)
        out = attend(q, kv.keys, kv.values, mask, enable_gqa=grouped)
        if seq > 1:
            out = out.transpose(1, 2)
        h = addmm(h, out.reshape(n, -1), wo)
        mm(h / norm(h, 2, -1, True).hypot(ffn_floor), w13, out=inner)
        return addmm(h, F.silu(gate) * up, w2)

    return step


class FusedLayers:
    """A stand-in for `Llama.run_layers`, for layers in the form for a CPU in float32."""

    def __init__(self, model: Llama) -> None:
        self._model, self._without_cache = model, model.run_layers
        self._blocks: list[FusedBlock] = [*model.layers.values()]  # type: ignore[list-item]
        self._steps: dict[tuple[int, int, int], list[Step | None]] = {}
        """The layers written out, by thread, rows of a pass and tokens of each: their buffers are
        one pass's at a time."""

    def __call__(
        self,
        h: Tensor,
        start: int,
        stop: int,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        masks: LayerMasks = NO_MASKS,
        skipped: SkippedParts = NOTHING,
        exit_layers: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run layers start, ..., stop - 1, see `Llama.run_layers`."""
        if cache is None:
            return self._without_cache(h, start, stop, masks=masks, exit_layers=exit_layers)
        assert positions is not None
        (batch, seq, _), exits = h.shape, {}
        turns, _ = self._model.rotary(positions, h)
        mask, layer_kv = cache.at(positions)
        steps, by_token = self._written_out(batch, seq), turns.transpose(1, 2)
        x = h.flatten(0, 1)
        for l in range(start, stop):
            p = self._model.gate(l, x)
            step, kv = steps[l], layer_kv(l)
            assert isinstance(kv, LayerSlots)
            assert isinstance(mask, Tensor), "compiled models have blocks"
            attend, feed = l not in skipped.attention, l not in skipped.feed_forward
            if step is not None and attend and feed:
                out = step(x, by_token, mask, kv)
            else:
                out = self._blocks[l].decode(x, turns, mask, kv, attend=attend, feed=feed)
            x = route(x, out, p)
            if l in exit_layers:
                exits[l] = x.view(h.shape)
        return x.view(h.shape), exits

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedLayers":
        """Copy all but the layers written out, which hold the weights they were written for."""
        twin = object.__new__(FusedLayers)
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, {} if name == "_steps" else deepcopy(value, memo))
        return twin

    def _written_out(self, batch: int, seq: int) -> list[Step | None]:
        if batch * seq > _WRITTEN_OUT_TOKENS:
            return [None] * len(self._blocks)
        key = threading.get_ident(), batch, seq
        if key not in self._steps:
            with torch.inference_mode(False):
                to = self._blocks[0].new_buffers(batch, seq)
            self._steps[key] = [written_out(block, to) for block in self._blocks]
        return self._steps[key]


class ComplexRotary:
    """A stand-in for `Llama.rotary`, for permuted heads."""

    def __init__(self, model: Llama) -> None:
        half = model.config.head_width // 2
        self._turns = torch.complex(model.rope_cos[:, :half], model.rope_sin[:, :half])

    def __call__(self, positions: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos + i sin twice, (batch or 1, 1, seq, head_dim / 2); see `Llama.rotary`."""
        if positions is None:
            turns = self._turns[None, None, : h.shape[1]]
        else:
            turns = self._turns[positions].unsqueeze(1)
        return turns, turns


@torch.no_grad()
def fuse(model: Llama, *, compiled: bool = False) -> None:
    """Fuse the layers of a model for decoding, in place; they stay the same function.

    Args:
        model: Not yet quantized or packed.
        compiled: Whether its layers are to be compiled.
    """
    config, weight = model.config, model.norm.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    on_the_spot = plain and not compiled and config.qk_norm == "none"
    for l in range(config.n_layers):
        model.layers[str(l)] = FusedBlock(model.block(l), on_the_spot=on_the_spot)
    for exit_parts in model.own_exits.values():
        if isinstance(exit_parts.feed_forward, FeedForward):
            exit_parts.feed_forward = FusedFeedForward(exit_parts.feed_forward)
    if on_the_spot:
        model.rotary = ComplexRotary(model)  # type: ignore[method-assign]
        model.norm = FewCallsNorm(model.norm)
        model.run_layers = FusedLayers(model)  # type: ignore[method-assign]
