"""What every strategy works on: a batch of rows, each with one token not yet run.

A row is prompt and continuation. Its last token is *pending*: known, but in no KV slot yet. A
strategy turns the pending tokens into a `Round`, using `run` and `distribution` alone, which
count the work; `decode.py` drives the rounds.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from inference.kv_cache import StaticKVCache
from inference.sampling import Sampling, probabilities
from models.llama import Llama


@dataclass
class Work:
    """What was really computed, junk in padding and finished rows included."""

    token_layers: int = 0
    """Tokens times layers."""
    head_evaluations: int = 0
    """Tokens the final norm and LM head were applied to."""


@dataclass(frozen=True)
class Round:
    """What one round of a strategy found for each row."""

    tokens: Tensor
    """(batch, drafted + 1) int64; the first accepted + 1 of a row are its continuation."""
    accepted: Tensor
    """(batch,) int64, how many of them are accepted drafts; the one after is the full model's."""
    drafted: int
    """Tokens drafted for each row."""


@dataclass(kw_only=True)
class DecodeState:
    """A batch between two rounds."""

    model: Llama
    cache: StaticKVCache
    sampling: Sampling
    generator: torch.Generator | None
    """Source of every draw; None when greedy."""
    pending: Tensor
    """(batch,) int64, the last token of each row."""
    positions: Tensor
    """(batch,) int64, the pending token's place in its row."""
    finished: Tensor
    """(batch,) bool. Such rows are still computed, parked at position 0, where they fit any
    draft; what they give is thrown away."""
    longest: int
    """The largest of `positions`, known to the host so that nothing waits for the device."""
    work: Work = field(default_factory=Work)

    def run(self, h: Tensor, start: int, stop: int, *, offset: int = 0) -> Tensor:
        """Run layers start, ..., stop - 1 on consecutive tokens of each row.

        Args:
            h: (batch, seq, dim), the tokens' x_start.
            start: First layer index l.
            stop: One past the last layer index.
            offset: Place of the first of them, counted from the pending token.

        Returns:
            x_stop, (batch, seq, dim); keys and values of these layers are in the cache.
        """
        batch, seq, _ = h.shape
        steps = torch.arange(offset, offset + seq, device=h.device)
        self.cache.window = self.longest + offset + seq
        self.work.token_layers += batch * seq * (stop - start)
        h, _ = self.model.run_layers(
            h, start, stop, positions=self.positions[:, None] + steps, cache=self.cache
        )
        return h

    def distribution(self, h: Tensor) -> Tensor:
        """Return the exit's distributions, (batch, seq, vocab), for h: (batch, seq, dim)."""
        self.work.head_evaluations += h.shape[0] * h.shape[1]
        return probabilities(self.model.exit_logits(h), self.sampling)

    def advance(self, result: Round) -> None:
        """Move each row on by its accepted tokens and the one after; the last is now pending."""
        self.pending = result.tokens.gather(1, result.accepted[:, None]).squeeze(1)
        self.positions = self.positions + result.accepted + 1


class Strategy(Protocol):
    """A way to continue rows."""

    def depth(self, n_layers: int) -> int:
        """Return how many of the model's layers it uses; the prompt is run through these."""
        ...

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with its settings for such a model, one line each."""
        ...

    def round(self, state: DecodeState, room: int) -> Round:
        """Continue every row by 1 to `room` tokens; the caller advances the state."""
        ...
