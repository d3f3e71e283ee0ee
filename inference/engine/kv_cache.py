"""Keys and values of earlier tokens in buffers of fixed size, each row at its own position.

A token's slot is its position. To roll back is not to advance the position: stale slots stay masked
until the token of their position overwrites them. Nothing is ever cropped, concatenated or zeroed.
Imports no strategy.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.attention_mask import slots_mask
from models.config import LlamaConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SPLIT_FROM = 1024
"""Slots of a window from which compiled passes on a GPU split it over its multiprocessors."""


def splits_slots(slots: Tensor, window: int) -> bool:
    """Return whether compiled passes split a window of the cache that `slots` are of."""
    return slots.is_cuda and window >= SPLIT_FROM


class _Window(NamedTuple):
    """The first slots of all layers."""

    slots: Tensor
    """(window,) int64, their indices."""
    layers: list[Tensor]
    """Of each layer, all slots of keys, then values: (batch, slots, 2 * kv_heads, head_dim)."""
    keys: list[Tensor]
    """Of each layer, views: (batch, kv_heads, window, head_dim)."""
    values: list[Tensor]
    """Of each layer, views: (batch, kv_heads, window, head_dim)."""


class TreeShape(NamedTuple):
    """Tokens after the pending one, itself the first, that are run as a tree.

    They take the slots from the pending token's on, in order.
    """

    depths: Tensor
    """(n,) int64, how far the position of each is from the pending token's."""
    sees: Tensor
    """(n, n) bool, which of the tokens each attends to, itself included."""


class StaticKVCache:
    """The KV cache of one batch, for all layers.

    Args:
        config: The model.
        batch: Number of rows.
        slots: Most tokens of a row.
        device: Of the buffers.
        dtype: Of keys and values.
        window_step: Windows are multiples of it, and so is the size of the buffers.
        compiled: Whether passes are compiled, which copy a buffer that others are views of.
        spare: Slots beyond these, for tokens that are tried beside those of the row.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        window_step: int = 1,
        compiled: bool = False,
        spare: int = 0,
    ) -> None:
        # A compiled pass is compiled for the size of the buffers, not of its window alone.
        held = -(-(slots + spare) // window_step) * window_step
        shape = (batch, held, 2 * config.n_kv_heads, config.head_width)
        groups = [1] * config.n_layers if compiled else [config.n_layers]
        # Zeros, not empty: a masked slot has weight 0, but 0 times a NaN left in memory is NaN.
        self._buffers = [torch.zeros(n, *shape, device=device, dtype=dtype) for n in groups]
        """Keys, then values, by layer, row and slot: those of a token are written at once."""
        self._kv_heads = config.n_kv_heads
        # A compiled pass may take no two tensors on the same memory if it writes one.
        self._keeps_window = not compiled
        self._kept: _Window | None = None
        self.slots, self.spare = slots, spare
        self.window_step = window_step
        self.window = held
        """Slots from this one on are neither masked nor read: one more than the largest position
        in the batch. Set by `set_window`, so that the cost of a pass follows the length of the
        text, not of the buffers. Rows of a ragged batch have unwritten slots inside the window,
        masked."""
        self._sliding_window = config.sliding_window
        self._slot_index = torch.arange(held, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        # On a CPU, torch's attention turns a mask of bools into one of numbers at every layer.
        self._hidden = torch.tensor(-torch.inf, dtype=dtype) if device.type == "cpu" else None

    @property
    def keys(self) -> list[Tensor]:
        """Of each layer, views: (batch, kv_heads, slots, head_dim)."""
        return self._views(len(self._slot_index)).keys

    @property
    def values(self) -> list[Tensor]:
        """Of each layer, views: (batch, kv_heads, slots, head_dim)."""
        return self._views(len(self._slot_index)).values

    def _views(self, slots: int) -> _Window:
        """Return the first slots of the keys and values of each layer."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for buffer in self._buffers:
            both = buffer[:, :, :slots].transpose(2, 3).split(self._kv_heads, dim=2)
            keys += both[0].unbind()
            values += both[1].unbind()
        layers = [layer for buffer in self._buffers for layer in buffer.unbind()]
        return _Window(self._slot_index[:slots], layers, keys, values)

    def _open_window(self) -> _Window:
        """Return the window, that of the last pass where it is the same."""
        if self._kept is not None and len(self._kept.slots) == self.window:
            return self._kept
        window = self._views(self.window)
        if self._keeps_window:
            self._kept = window
        return window

    def set_window(self, slots: int) -> None:
        """Set the window to the first `slots` slots, rounded up."""
        self.window = -(-slots // self.window_step) * self.window_step

    def row(self, row: int) -> "StaticKVCache":
        """Return the cache of one row alone, on the same memory."""
        return self.part(slice(row, row + 1))

    def part(self, rows: slice) -> "StaticKVCache":
        """Return the cache of some consecutive rows alone, on the same memory."""
        view = copy(self)
        view._buffers = [buffer[:, rows] for buffer in self._buffers]
        view._kept = None
        view._rows = self._rows[: view._buffers[0].shape[1]]
        return view

    def move_row(self, source: int, target: int, slots: int) -> None:
        """Copy the first slots of a row over those of another."""
        for buffer in self._buffers:
            buffer[:, target, :slots] = buffer[:, source, :slots]

    def at(self, positions: Tensor) -> "tuple[Tensor | BlockMask, Callable[[int], LayerSlots]]":
        """Open the cache for tokens at `positions`: (batch, seq) int64, all below `window`.

        Returns:
            The mask slot <= position, (batch, 1, seq, window), without slots behind the model's
            sliding window: True, or 0 on a CPU, where a query attends, False or -inf where it does
            not; its blocks where a long window is split. And a function from layer index l to that
            layer's storage.
        """
        if torch.compiler.is_compiling() and splits_slots(self._slot_index, self.window):
            blocks = slots_mask(positions, self.window, self._sliding_window)
            return blocks, self.layers_at(positions)
        slots, query = self._open_window().slots, positions.view(len(positions), 1, -1, 1)
        mask = slots <= query
        if self._sliding_window is not None and self._sliding_window < self.window:
            mask &= slots > query - self._sliding_window
        return self._numbers(mask), self.layers_at(positions)

    def open_tree(self, shape: TreeShape, pending: Tensor) -> "OpenTree":
        """Open the cache for the tokens of a tree, all within the window.

        Args:
            shape: The tree.
            pending: (batch,) int64, position of each row's pending token.
        """
        n, depths = len(shape.depths), shape.depths
        beyond = self._open_window().slots - pending[:, None]
        token = beyond.clamp(0, n - 1)
        mask = shape.sees[:, token].transpose(0, 1) & (beyond < n)[:, None]
        mask |= (beyond < 0)[:, None]
        if self._sliding_window is not None and self._sliding_window < self.window:
            key_depths = torch.where(beyond < 0, beyond, depths[token]).unsqueeze(1)
            mask &= depths[:, None] - key_depths < self._sliding_window
        positions, slots = (pending[:, None] + each for each in (depths, self._slot_index[:n]))
        return OpenTree(self, positions, slots, self._numbers(mask.unsqueeze(1)))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slot `source` of each row to `target` in all layers, (batch,) int64 both."""
        rows = self._rows[:, 0]
        for buffer in self._buffers:
            buffer[:, rows, target] = buffer[:, rows, source]

    def layers_at(self, slots: Tensor) -> Callable[[int], "LayerSlots"]:
        """Return the storage of layer l, opened for tokens that belong in `slots`: (batch, seq)."""
        window, index = self._open_window(), (self._rows, slots)
        return lambda l: LayerSlots(window.layers[l], window.keys[l], window.values[l], index)

    def _numbers(self, mask: Tensor) -> Tensor:
        return mask if self._hidden is None else torch.where(mask, 0.0, self._hidden)


@dataclass(frozen=True)
class OpenTree:
    """A cache opened for a pass over tokens of a tree."""

    cache: StaticKVCache
    positions: Tensor
    """(batch, n) int64, of the tokens."""
    slots: Tensor
    """(batch, n) int64, where their keys and values belong."""
    mask: Tensor
    """(batch, 1, n, window), as of `StaticKVCache.at`."""

    def since(self, first: int) -> "OpenTree":
        """Return the cache for the tokens from the `first` on, the others having been run."""
        positions, slots = self.positions[:, first:], self.slots[:, first:]
        return OpenTree(self.cache, positions, slots, self.mask[:, :, first:])

    def at(self, positions: Tensor) -> tuple[Tensor, Callable[[int], "LayerSlots"]]:
        """Return mask and storage, see `StaticKVCache.at`."""
        return self.mask, self.cache.layers_at(self.slots)


class LayerSlots:
    """One layer's buffers, opened for the tokens of one pass.

    Args:
        buffer: (batch, slots, 2 * kv_heads, head_dim), keys, then values.
        keys: (batch, kv_heads, window, head_dim), a view.
        values: (batch, kv_heads, window, head_dim), a view.
        index: Row and slot of each token, int64, together (batch, seq).
    """

    def __init__(
        self, buffer: Tensor, keys: Tensor, values: Tensor, index: tuple[Tensor, Tensor]
    ) -> None:
        self._buffer, self._index, self.keys, self.values = buffer, index, keys, values
        self.shape = index[1].shape
        """Rows of the pass, and tokens of each."""

    def write(self, kv: Tensor) -> None:
        """Write the tokens' keys and values, (batch, seq, 2 * kv_heads, head_dim)."""
        # Compiled, a scatter_ would copy all slots, twice, and this does not.
        self._buffer.index_put_(self._index, kv)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v: (batch, kv_heads, seq, head_dim) into their slots.

        Returns:
            Keys and values of the window: views, (batch, kv_heads, window, head_dim).
        """
        self.write(torch.cat((k, v), dim=1).transpose(1, 2))
        return self.keys, self.values
