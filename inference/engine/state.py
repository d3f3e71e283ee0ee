"""What every strategy works on: a batch of rows, each with one token not yet run.

A row is prompt and continuation. Its last token is *pending*: known, but in no KV slot yet. A
strategy turns the pending tokens into a `Round`, using `run`, `write_keys_and_values`,
`distribution`, `sync_bool` and `sync_list` alone, which count the work; `generation.py` drives the
rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from inference.engine.counters import Counters
from inference.engine.kv_cache import StaticKVCache
from inference.engine.sampling import Sampling, probabilities
from models.llama import NOTHING, Llama, SkippedParts


@dataclass(frozen=True)
class Round:
    """What one round of a strategy found for each row."""

    tokens: Tensor
    """(batch, n) int64; the first accepted + 1 of a row, at most n, are its continuation."""
    accepted: Tensor
    """(batch,) int64, how many of them are drafts that were accepted; one more token follows."""
    drafted: Tensor
    """(batch,) int64, tokens drafted; accepted to n - 1."""
    depths: Tensor | None = None
    """(batch, n) int64, layers behind each token where it may be fewer than the strategy's
    deepest."""

    @classmethod
    def plain(cls, token: Tensor, depths: Tensor | None = None) -> Self:
        """Return a round without drafts.

        Args:
            token: (batch, 1) int64.
            depths: (batch,) int64, layers behind it.
        """
        none = token.new_zeros(len(token))
        return cls(token, none, none, None if depths is None else depths[:, None])


@dataclass(kw_only=True)
class DecodeState:
    """A batch between two rounds. Tensors are changed in place, never replaced."""

    model: Llama
    cache: StaticKVCache
    sampling: Sampling
    generator: torch.Generator | None
    """Source of every draw; None when greedy."""
    history: Tensor
    """(batch, slots + 1) int64, each row's tokens by place, the pending one the last that counts.
    What would fall beyond the slots lands in the extra one."""
    pending: Tensor
    """(batch,) int64, the last token of each row."""
    positions: Tensor
    """(batch,) int64, the pending token's place in its row."""
    prompt_lengths: Tensor
    """(batch,) int64, tokens of each row that were given."""
    finished: Tensor
    """(batch,) bool. Such rows are still computed, parked at position 0, where they fit any
    draft; what they give is thrown away."""
    max_position: int
    """At least the largest of `positions`, known to the host so that nothing waits for the
    device."""
    num_prefills: int = 0
    """Times prompts were put into rows."""
    counters: Counters = field(default_factory=Counters)

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
            offset: Place of the first of them, counted from the pending token; no less than the
                truth where `first` is given.
            first: (batch,) int64, place of each row's first token; None: pending token + offset.
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
        """Do as `run` does, and return {l: x_{l+1}} for l in `exit_layers` as well."""
        tokens = h.shape[0] * h.shape[1]
        parts = 2 * (stop - start) - sum(
            start <= l < stop for part in (skipped.attention, skipped.feed_forward) for l in part
        )
        self.counters.token_layers += tokens * parts / 2
        self.counters.passes[start, stop, h.shape[1]] += 1
        return self.model.run_layers(
            h,
            start,
            stop,
            positions=self._places(h.shape[1], offset, first),
            cache=self.cache,
            skipped=skipped,
            exit_layers=exit_layers,
        )

    def write_keys_and_values(self, h: Tensor, start: int, stop: int, *, offset: int = 0) -> None:
        """Give tokens that left with h: (batch, seq, dim) keys and values in layers they missed.

        See `Llama.write_keys_and_values`; `offset` as in `run`.
        """
        self.counters.projected += h.shape[0] * h.shape[1] * (stop - start)
        self.model.write_keys_and_values(
            h, start, stop, positions=self._places(h.shape[1], offset, None), cache=self.cache
        )

    def _places(self, seq: int, offset: int, first: Tensor | None) -> Tensor:
        steps = torch.arange(seq, device=self.positions.device)
        self.cache.set_window(self.max_position + offset + seq)
        start = self.positions + offset if first is None else first
        return start[:, None] + steps

    def distribution(self, h: Tensor, E: int | None = None) -> Tensor:
        """Return the exit's distributions, (batch, seq, vocab), for h = x_E: (batch, seq, dim)."""
        return self.filtered(self.logits(h, E))

    def filtered(self, logits: Tensor) -> Tensor:
        """Return the distributions tokens are drawn from, for logits: (batch, seq, vocab)."""
        return probabilities(logits, self.sampling)

    def logits(self, h: Tensor, E: int | None = None) -> Tensor:
        """Return the exit's logits, (batch, seq, vocab), for h = x_E: (batch, seq, dim).

        E is None where h is x_L, or stands for it.
        """
        return self.head(self.before_head(h, E))

    def before_head(self, h: Tensor, E: int | None = None) -> Tensor:
        """Return what the head reads for h = x_E: (batch, seq, dim), same shape."""
        config = self.model.config
        if config.own_exit_mlp and E in config.own_exits:
            self.counters.token_layers += h.shape[0] * h.shape[1] / 2
        return self.model.before_head(h, E)

    def head(self, x: Tensor, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return logits, (batch, seq, vocab), for what `before_head` gave: (batch, seq, dim).

        With `part`, a part of the LM head, those of its part of the vocabulary.
        """
        logits = self.model.head(x) if part is None else part(x)
        share = logits.shape[-1] / self.model.config.vocab_size
        tokens = x.shape[0] * x.shape[1]
        self.counters.head_evaluations += tokens * share
        self.counters.head_passes[tokens // len(self.pending)] += 1
        return logits

    def sync_bool(self, condition: Tensor) -> bool:
        """Return a condition of one element: the host waits for the device."""
        self.counters.syncs += 1
        return bool(condition)

    def sync_list(self, numbers: Tensor) -> list[Any]:
        """Return the numbers of a vector: the host waits for the device."""
        self.counters.syncs += 1
        return list(numbers.tolist())

    def advance(self, result: Round) -> None:
        """Move each row on by its accepted tokens and the one after; the last is now pending."""
        n = result.tokens.shape[1]
        places = self.positions[:, None] + torch.arange(1, n + 1, device=self.positions.device)
        places.clamp_(max=self.history.shape[1] - 1)
        self.history.scatter_(1, places, result.tokens)
        self.pending.copy_(result.tokens.gather(1, result.accepted[:, None]).squeeze(1))
        self.positions.add_((result.accepted + 1).masked_fill(self.finished, 0))
        self.max_position += n


Decoder = Callable[[int], Round]
"""Continues every row by 1 to `max_tokens` tokens, at least 1; the caller advances the state.
A row that was finished may hold another prompt the next time."""


def _nothing(tokens: int) -> None:
    """Have nothing to prepare."""


@dataclass(frozen=True)
class GraphableDecoder:
    """A decoder whose rounds can be one graph: all of so many tokens tell the device the same.

    They ask it nothing, take no tensor of the host's, and leave no tensor to the next round but
    those they change in place.
    """

    most: int
    """Tokens of a round where there is room."""
    run: Decoder
    """Runs a round of so many tokens, at most `most`."""
    prepare: Callable[[int], None] = _nothing
    """What the host does before a round of so many tokens; it may ask."""

    def __call__(self, max_tokens: int) -> Round:
        """Run a round of as many tokens as there is room for."""
        n = min(max_tokens, self.most)
        self.prepare(n)
        return self.run(n)


def advancing(state: DecodeState, decoder: Decoder) -> Decoder:
    """Return a decoder, of the same kind, that advances the state as well."""
    if isinstance(decoder, GraphableDecoder):
        return replace(decoder, run=advancing(state, decoder.run))

    def run(max_tokens: int) -> Round:
        result = decoder(max_tokens)
        state.advance(result)
        return result

    return run
