"""A decoder: what a strategy makes of a batch, called once a round."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from inference.engine.batch import Batch, Round

R = TypeVar("R", bound=Round | None)

Decoder = Callable[[int], Round]
"""Continues every row by 1 to `max_tokens` tokens, its only argument, at least 1; the caller
advances the batch. A row that was finished may hold another prompt in the next round."""


@dataclass(frozen=True)
class GraphableDecoder:
    """A decoder whose rounds can be captured as CUDA graphs.

    All rounds of the same number of tokens launch the same kernels: they never wait for the device,
    take no tensor from the host, and share no tensor with the next round but those they update.
    """

    max_tokens: int
    """Tokens of a round where there is room."""
    run: Decoder
    """Runs a round of exactly so many tokens, at most `max_tokens`."""
    prepare: Callable[[int], Round | None] = lambda tokens: None
    """Called before a round of so many tokens, outside the graph; it may wait for the device. A
    round that it returns takes the place of that round."""

    def __call__(self, max_tokens: int) -> Round:
        n = min(max_tokens, self.max_tokens)
        return self.prepare(n) or self.run(n)


def advancing(batch: Batch, decoder: Decoder) -> Decoder:
    """Return a decoder, graphable if the given one is, that advances the batch as well."""
    if isinstance(decoder, GraphableDecoder):
        run, prepare = decoder.run, decoder.prepare
        return replace(decoder, run=_advancing(batch, run), prepare=_advancing(batch, prepare))
    return _advancing(batch, decoder)


def _advancing(batch: Batch, decode: Callable[[int], R]) -> Callable[[int], R]:
    def run(max_tokens: int) -> R:
        if (result := decode(max_tokens)) is not None:
            batch.advance(result)
        return result

    return run
