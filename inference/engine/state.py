"""What every strategy works on: a batch, and the model that continues it.

A strategy turns the pending tokens of the batch into a `Round` through the methods here, which
count what is computed and every wait for the device. `generation.py` drives the rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.engine.batch import Batch
from inference.engine.counters import Counters
from inference.engine.kv_cache import OpenTree, StaticKVCache, TreeShape
from inference.engine.row_draws import RowDraws
from inference.engine.sampling import Sampling, draw_weights
from models.block import KVCache
from models.llama import NOTHING, Llama, SkippedParts


@dataclass(kw_only=True)
class DecodeState:
    """A model with a batch, its KV cache and its counters."""

    model: Llama
    batch: Batch
    cache: StaticKVCache
    sampling: Sampling
    generator: torch.Generator | None
    """Source of every draw; None when greedy, and where rows have draws of their own."""
    counters: Counters = field(default_factory=Counters)
    draws: RowDraws | None = None
    """How each row's tokens are drawn, where rows differ; strategies then go on as if greedy."""
    ran: Tensor | None = None
    """(batch, seq) int64, positions of the last pass's tokens, whose logits come next."""

    def embed_pending(self) -> Tensor:
        """Return x_0 of the pending tokens, (batch, 1, dim)."""
        return self.model.embed(self.batch.pending[:, None])

    def run(
        self,
        h: Tensor,
        start: int,
        stop: int,
        *,
        offset: int = 0,
        first: Tensor | None = None,
        skipped: SkippedParts = NOTHING,
    ) -> Tensor:
        """Run layers start, ..., stop - 1 on consecutive tokens of each row.

        Args:
            h: (batch, seq, dim), the tokens' x_start.
            start: First layer index l.
            stop: One past the last layer index.
            offset: Position of the first of them after the pending token; where `first` is given,
                an upper bound.
            first: (batch,) int64, position of each row's first token; None: the pending token's
                position + offset.
            skipped: Parts of layers to leave out.

        Returns:
            x_stop, (batch, seq, dim); keys and values of these layers are in the cache.
        """
        return self.run_and_tap(
            h, start, stop, offset=offset, first=first, skipped=skipped, exit_layers=()
        )[0]

    def run_and_tap(
        self,
        h: Tensor,
        start: int,
        stop: int,
        *,
        exit_layers: range | tuple[int, ...],
        offset: int = 0,
        first: Tensor | None = None,
        skipped: SkippedParts = NOTHING,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run layers as `run` does; return x_stop, and {l: x_{l+1}} for l in `exit_layers`."""
        return self._run(
            h,
            start,
            stop,
            positions=self._positions(h.shape[1], offset, first),
            cache=self.cache,
            skipped=skipped,
            exit_layers=exit_layers,
        )

    def open_tree(self, shape: TreeShape) -> OpenTree:
        """Open the cache for the pending tokens and those of a tree after each."""
        self.cache.set_window(self.batch.max_position + len(shape.depths))
        return self.cache.open_tree(shape, self.batch.positions)

    def run_tree(self, h: Tensor, start: int, stop: int, tree: OpenTree) -> Tensor:
        """Run layers start, ..., stop - 1 on tokens of a tree.

        Args:
            h: (batch, n, dim), their x_start.
            start: First layer index l.
            stop: One past the last layer index.
            tree: The cache, opened for these tokens.

        Returns:
            x_stop, (batch, n, dim).
        """
        return self._run(h, start, stop, positions=tree.positions, cache=tree)[0]

    def _run(
        self,
        h: Tensor,
        start: int,
        stop: int,
        *,
        positions: Tensor,
        cache: KVCache,
        skipped: SkippedParts = NOTHING,
        exit_layers: range | tuple[int, ...] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run layers at these positions, (batch, seq) int64, and count it."""
        tokens = h.shape[0] * h.shape[1]
        parts = 2 * (stop - start) - sum(
            start <= l < stop for part in (skipped.attention, skipped.feed_forward) for l in part
        )
        self.counters.token_layers += tokens * parts / 2
        self.counters.passes[start, stop, h.shape[1]] += 1
        self.ran = positions
        return self.model.run_layers(
            h,
            start,
            stop,
            positions=positions,
            cache=cache,
            skipped=skipped,
            exit_layers=exit_layers,
        )

    def write_keys_and_values(self, h: Tensor, start: int, stop: int, *, offset: int = 0) -> None:
        """Write keys and values of layers that tokens did not run, as projections of their state.

        See `Llama.write_keys_and_values`.

        Args:
            h: (batch, seq, dim), the state each token exited with.
            start: First layer index l.
            stop: One past the last layer index.
            offset: As in `run`.
        """
        self.counters.projected += h.shape[0] * h.shape[1] * (stop - start)
        self.model.write_keys_and_values(
            h, start, stop, positions=self._positions(h.shape[1], offset, None), cache=self.cache
        )

    def _positions(self, seq: int, offset: int, first: Tensor | None) -> Tensor:
        """Return (batch, seq) int64, with the cache's window set to hold them."""
        self.cache.set_window(self.batch.max_position + offset + seq)
        start = self.batch.positions if first is None else first
        if first is None and offset:
            start = start + offset
        positions = start[:, None]
        return positions if seq == 1 else positions + torch.arange(seq, device=positions.device)

    def distribution(
        self, h: Tensor, E: int | None = None, *, positions: Tensor | None = None
    ) -> Tensor:
        """Return `filtered` logits of an exit for h = x_E: (batch, seq, dim)."""
        return self.filtered(self.logits(h, E), positions=positions)

    def filtered(self, logits: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """Return what tokens are drawn from, see `draw_weights`; same shape as logits.

        Args:
            logits: (batch, seq, vocab), or several times batch: of exits, one after the other.
            positions: (batch, seq) int64, of their tokens; the first of the last pass if None.
        """
        if self.draws is None:
            return draw_weights(logits, self.sampling)
        positions = self.ran if positions is None else positions
        assert positions is not None
        several = logits.unflatten(0, (-1, len(self.batch)))
        scores = [self.draws.scores(one, positions[:, : logits.shape[1]]) for one in several]
        return torch.cat(scores)

    def logits(self, h: Tensor, E: int | None = None) -> Tensor:
        """Return an exit's logits, (batch, seq, vocab).

        Args:
            h: x_E, (batch, seq, dim).
            E: Layers run; None where h is x_L, or an estimate of it.
        """
        return self.head(self.before_head(h, E))

    def before_head(self, h: Tensor, E: int | None = None) -> Tensor:
        """Return the head's input for h = x_E: (batch, seq, dim), same shape."""
        config = self.model.config
        if config.own_exit_mlp and E in config.own_exits:
            self.counters.token_layers += h.shape[0] * h.shape[1] / 2
        return self.model.before_head(h, E)

    def head(self, x: Tensor, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return logits, (batch, seq, vocab).

        Args:
            x: Output of `before_head`, (batch, seq, dim).
            part: A part of the LM head, for logits of its part of the vocabulary alone.
        """
        logits = self.model.head(x) if part is None else part(x)
        share = logits.shape[-1] / self.model.config.vocab_size
        tokens = x.shape[0] * x.shape[1]
        self.counters.head_evaluations += tokens * share
        self.counters.head_passes[tokens // len(self.batch)] += 1
        return logits

    def sync_bool(self, condition: Tensor) -> bool:
        """Read a condition of one element, for which the host waits for the device."""
        self.counters.syncs += 1
        return bool(condition)

    def sync_list(self, numbers: Tensor) -> list[Any]:
        """Read a vector, for which the host waits for the device."""
        self.counters.syncs += 1
        return list(numbers.tolist())
