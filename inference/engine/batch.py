"""The rows of a batch between two rounds, and what a round returns. Imports no model.

A row is prompt and continuation. Its last token is *pending*: known, but not run yet, so in no KV
slot.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Round:
    """The result of one round, for each row."""

    tokens: Tensor
    """(batch, n) int64; the first accepted + 1 of a row, at most n, are its continuation."""
    accepted: Tensor
    """(batch,) int64, how many of them are drafts that were accepted; one more token follows."""
    drafted: Tensor
    """(batch,) int64, tokens drafted; accepted to n - 1."""
    depths: Tensor | None = None
    """(batch, n) int64, layers run for each token; None where the strategy does not vary them."""
    most_drafted: int | None = None
    """Tokens of a draft that no stop rule ends; None: n - 1."""
    leaf: Tensor | None = None
    """(batch,) int64, rank from 1 of the leaf that is the last accepted one, another candidate in
    place of the drafted token, which was rejected; 0: it is none; None: there are no leaves."""

    @classmethod
    def plain(cls, token: Tensor, depths: Tensor | None = None) -> Self:
        """Return a round without drafts.

        Args:
            token: (batch, 1) int64.
            depths: (batch,) int64, layers run for it.
        """
        none = token.new_zeros(len(token))
        return cls(token, none, none, None if depths is None else depths[:, None])


@dataclass(kw_only=True)
class Batch:
    """The tensors of all rows, changed in place and never replaced, and their host-side lengths."""

    history: Tensor
    """(batch, slots + 1) int64, each row's tokens by position, up to the pending one. Tokens beyond
    the last slot are written into the extra one."""
    pending: Tensor
    """(batch,) int64, the last token of each row."""
    positions: Tensor
    """(batch,) int64, the position of the pending token in its row."""
    prompt_lengths: Tensor
    """(batch,) int64, tokens of each row's prompt."""
    finished: Tensor
    """(batch,) bool. Such rows are still computed, parked at position 0, where they fit any draft;
    their results are discarded."""
    max_position: int = 0
    """At least the largest of `positions`, kept on the host so that nothing waits for the
    device."""
    num_prefills: int = 0
    """Times prompts were put into rows."""

    @classmethod
    def empty(cls, rows: int, slots: int, device: torch.device) -> Self:
        """Return a batch of so many rows of up to `slots` tokens, with no prompts in them yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            history=zeros(rows, slots + 1),
            pending=zeros(rows),
            positions=zeros(rows),
            prompt_lengths=zeros(rows),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.positions.device

    @property
    def new_tokens(self) -> Tensor:
        """(batch,) int64, tokens of each row after its prompt, the pending one included."""
        return self.positions + 1 - self.prompt_lengths

    def row(self, row: int) -> "Batch":
        """Return one row as a batch of its own, on the same memory."""
        return self.part(slice(row, row + 1))

    def part(self, rows: slice) -> "Batch":
        """Return some rows as a batch of their own, on the same memory."""
        return Batch(
            history=self.history[rows],
            pending=self.pending[rows],
            positions=self.positions[rows],
            prompt_lengths=self.prompt_lengths[rows],
            finished=self.finished[rows],
        )

    def move_row(self, source: int, target: int) -> None:
        """Copy a row over another."""
        for rows in (self.history, self.pending, self.positions, self.prompt_lengths):
            rows[target] = rows[source]
        self.finished[target] = self.finished[source]

    def park(self, row: int) -> None:
        """Leave a row without a text: it no longer moves on."""
        self.finished[row] = True
        self.positions[row] = 0

    def advance(self, result: Round) -> None:
        """Move each row on by its accepted tokens and the one after, which is then pending."""
        n = result.tokens.shape[1]
        if n == 1:
            self.positions.add_(~self.finished)
            self.history.scatter_(1, self.positions[:, None], result.tokens)
            self.pending.copy_(result.tokens[:, 0])
            self.max_position += 1
            return
        positions = self.positions[:, None] + torch.arange(1, n + 1, device=self.device)
        positions.clamp_(max=self.history.shape[1] - 1)
        self.history.scatter_(1, positions, result.tokens)
        self.pending.copy_(result.tokens.gather(1, result.accepted[:, None]).squeeze(1))
        self.positions.add_((result.accepted + 1).masked_fill(self.finished, 0))
        self.max_position += n
