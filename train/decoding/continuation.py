"""Greedy continuations by all layers, and what every exit predicts along them.

With `models/` alone, through the model's own forward: under FSDP every rank calls it equally often.
The decoding that users are served, of any strategy, is `inference/engine/`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.config import LlamaConfig
from models.llama import Llama


class KVSlots:
    """Keys and values of every layer, a slot for each position; later tokens overwrite it."""

    def __init__(self, config: LlamaConfig, slots: int) -> None:
        """Make the slots of a layer when it first writes to them, of its dtype."""
        self._slots, self._window = slots, config.sliding_window
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor) -> tuple[Tensor, Callable[[int], "_LayerKV"]]:
        """Open the slots for tokens at `positions`, see `models.block.KVCache`."""
        slots = torch.arange(self._slots, device=positions.device)
        query = positions[:, None, :, None]
        mask = slots <= query
        if self._window is not None:
            mask &= slots > query - self._window
        return mask, lambda l: _LayerKV(self, l, positions)

    def write(self, l: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v of layer l: (batch, kv_heads, seq, head_dim); return all of its slots."""
        batch, heads, _, width = k.shape
        if l not in self._held:
            # Zeros: a masked slot has weight 0, but 0 times a NaN left in memory is NaN.
            empty = k.new_zeros(batch, heads, self._slots, width)
            self._held[l] = empty, empty.clone()
        index = positions[:, None, :, None].expand_as(k)
        for held, new in zip(self._held[l], (k, v), strict=True):
            held.scatter_(2, index, new)
        return self._held[l]


class _LayerKV:
    """One layer's slots, opened for the tokens of one pass."""

    def __init__(self, slots: KVSlots, l: int, positions: Tensor) -> None:
        self._slots, self._l, self._positions = slots, l, positions

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v: (batch, kv_heads, seq, head_dim); return all keys and values."""
        return self._slots.write(self._l, self._positions, k, v)


@torch.no_grad()
def continue_greedily(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    exits: Sequence[int],
    new_tokens: int,
    device: torch.device,
) -> Tensor:
    """Continue every prompt by what its exit predicts; return what all exits predict along it.

    Every rank calls the model 1 + (new_tokens - 1) times, whatever its prompts are. Documents,
    stochastic depth and the layers of single tokens are training's alone: all tokens run all
    layers, a router's own choices excepted.

    Args:
        model: The model being trained.
        prompts: Token ids, of any lengths; at least one row.
        exits: E of each row, the layers whose prediction is its next token.
        new_tokens: To add to each; none is cut at an end.
        device: Of the model.

    Returns:
        (rows, L, new_tokens) int64, on the host.
    """
    L, rows = model.config.n_layers, torch.arange(len(prompts), device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(max(map(len, prompts)))
    # A row's padding is written behind its prompt, where its own tokens overwrite it unread.
    tokens = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
    positions = torch.arange(width, device=device).expand(len(prompts), -1)
    read = torch.tensor([E - 1 for E in exits], device=device)
    last, cache, found = lengths - 1, KVSlots(model.config, width + new_tokens), []
    for i in range(new_tokens):
        hidden = model(tokens, exit_layers=range(L), positions=positions, cache=cache)
        x = torch.stack([state[rows, last] for state in hidden.exits.values()])
        found.append(model.head(x).argmax(-1))  # (L, rows)
        tokens, last = found[-1][read, rows][:, None], torch.zeros_like(last)
        positions = (lengths + i)[:, None]
    return torch.stack(found, dim=-1).transpose(0, 1).cpu()
