"""Keys and values of earlier tokens in buffers of fixed size, each row at its own position.

A token's slot is its position. To roll back is not to advance the position: stale slots stay masked
until the token of their position overwrites them. Nothing is ever cropped, concatenated or zeroed.
Imports no strategy.
"""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from models.config import LlamaConfig


class StaticKVCache:
    """The KV cache of one batch, for all layers.

    Args:
        config: The model.
        batch: Number of rows.
        slots: Most tokens of a row.
        device: Of the buffers.
        dtype: Of keys and values.
        window_step: Windows are multiples of it, and so is the size of the buffers.
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
    ) -> None:
        # A compiled pass is compiled for the size of the buffers, not of its window alone.
        held = -(-slots // window_step) * window_step
        shape = (batch, config.n_kv_heads, held, config.head_width)
        # Zeros, not empty: a masked slot has weight 0, but 0 times a NaN left in memory is NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.slots = slots
        self.window_step = window_step
        self.window = held
        """Slots from this one on are neither masked nor read: one more than the largest position
        in the batch. Set by `set_window`, so that the cost of a pass follows the length of the
        text, not of the buffers. Rows of a ragged batch have unwritten slots inside the window,
        masked."""
        self._sliding_window = config.sliding_window
        self._slot_index = torch.arange(held, device=device)

    def set_window(self, slots: int) -> None:
        """Set the window to the first `slots` slots, rounded up."""
        self.window = -(-slots // self.window_step) * self.window_step

    def row(self, row: int) -> "StaticKVCache":
        """Return the cache of one row alone, on the same memory."""
        view = copy(self)
        view.keys = [keys[row : row + 1] for keys in self.keys]
        view.values = [values[row : row + 1] for values in self.values]
        return view

    def at(self, positions: Tensor) -> tuple[Tensor, Callable[[int], "LayerSlots"]]:
        """Open the cache for tokens at `positions`: (batch, seq) int64, all below `window`.

        Returns:
            The mask slot <= position, (batch, 1, seq, window) bool, without slots behind the
            model's sliding window, and a function from layer index l to that layer's storage.
        """
        slots, query = self._slot_index[: self.window], positions[:, None, :, None]
        mask = slots <= query
        if self._sliding_window is not None and self._sliding_window < self.window:
            mask &= slots > query - self._sliding_window
        batch, kv_heads = self.keys[0].shape[:2]
        rows = torch.arange(batch, device=positions.device)[:, None, None]
        heads = torch.arange(kv_heads, device=positions.device)[:, None]
        index = (rows, heads, positions[:, None])
        return mask, lambda l: LayerSlots(self.keys[l], self.values[l], index, self.window)


class LayerSlots:
    """One layer's buffers, opened for the tokens of one pass.

    Args:
        keys: (batch, kv_heads, slots, head_dim).
        values: (batch, kv_heads, slots, head_dim).
        index: Row, head and slot of each token, int64, together (batch, kv_heads, seq).
        window: Number of slots to read.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, index: tuple[Tensor, ...], window: int
    ) -> None:
        self._keys, self._values, self._index, self._window = keys, values, index, window

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v: (batch, kv_heads, seq, head_dim) into their slots.

        Returns:
            Keys and values of the window: views, (batch, kv_heads, window, head_dim).
        """
        # Compiled, a scatter_ would copy all slots, twice, and this does not.
        self._keys.index_put_(self._index, k)
        self._values.index_put_(self._index, v)
        return self._keys[:, :, : self._window], self._values[:, :, : self._window]
