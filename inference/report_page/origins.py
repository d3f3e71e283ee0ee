"""Where every token of a decoded text comes from: which layers drafted it, or a lookup."""

from dataclasses import dataclass
from typing import Literal

from inference.engine.generation import Generation
from inference.engine.strategy import Strategy
from inference.evaluation.exit_traces import record_predictions
from inference.loading.run import Run
from inference.strategies.registry import describe
from inference.text.continuation import provenance
from inference.text.detokenizer import Detokenizer

Origin = Literal["drafted", "lookup", "corrected", "plain"]


@dataclass(frozen=True)
class DecodedToken:
    """One token of a text that was decoded."""

    text: str
    """What became certain with it."""
    token: int
    origin: Origin
    layers: int
    """That chose it: of a draft those that drafted, 0 for a lookup, else all."""
    round: int
    """From 1."""
    probability: float
    """Under all layers."""
    settled: int
    """The first E from which every exit's most probable token is the last layer's."""


@dataclass(frozen=True)
class DecodedText:
    """A continuation, token by token."""

    strategy: str
    tokens: list[DecodedToken]
    rounds: int
    accepted: int
    drafted: int


def decode_with_origins(
    run: Run, prompt: list[int], strategy: Strategy, max_new_tokens: int
) -> DecodedText:
    """Decode one prompt greedily, and follow each round: which exit drafted, or whether none did.

    Of a row alone, a step of the layers 0 to E - 1 is a drafted token; a round that has drafts and
    no such step took them from a lookup.
    """
    L = run.model.config.n_layers
    generation = Generation(
        run.model,
        [prompt],
        strategy,
        max_new_tokens=max_new_tokens,
        stop_tokens=run.stop_tokens,
        async_readback=False,
    )
    detokenizer = Detokenizer(run.tokenizer, prompt)
    origins: list[tuple[Origin, int, int]] = []
    passes = generation.counters.passes.copy()
    for number, emissions in enumerate(generation, start=1):
        new = generation.counters.passes - passes
        passes = generation.counters.passes.copy()
        steps = [stop for start, stop, n in new if start == 0 and n == 1 and stop < L]
        drafted: tuple[Origin, int] = ("drafted", max(steps)) if steps else ("lookup", 0)
        for emission in emissions:
            for where in provenance(emission):
                origin: tuple[Origin, int] = drafted if where == "accepted" else (where, L)
                origins.append((*origin, number))
    tokens = generation.tokens[0]
    texts = [detokenizer.push(token) for token in tokens]
    if texts:
        texts[-1] += detokenizer.finish()
    predicted = record_predictions(run.model, prompt + tokens, len(prompt))
    found = [
        DecodedToken(text, token, origin, layers, number, probability, settled)
        for text, token, (origin, layers, number), probability, settled in zip(
            texts,
            tokens,
            origins,
            predicted.likelihood[-1].tolist(),
            predicted.settled(),
            strict=True,
        )
    ]
    counts = generation.counters
    return DecodedText(describe(strategy), found, counts.rounds, counts.accepted, counts.drafted)
