"""A decoder: what a strategy makes of a batch, called once a round."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from inference.engine.batch import Batch, Round

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
    prepare: Callable[[int], object] = lambda tokens: None
    """Called before a round of so many tokens, outside the graph; it may wait for the device."""

    def __call__(self, max_tokens: int) -> Round:
        n = min(max_tokens, self.max_tokens)
        self.prepare(n)
        return self.run(n)


def advancing(batch: Batch, decoder: Decoder) -> Decoder:
    """Return a decoder, graphable if the given one is, that advances the batch as well."""
    if isinstance(decoder, GraphableDecoder):
        return replace(decoder, run=advancing(batch, decoder.run))

    def run(max_tokens: int) -> Round:
        result = decoder(max_tokens)
        batch.advance(result)
        return result

    return run
