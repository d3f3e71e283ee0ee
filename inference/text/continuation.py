"""What was decoded: text, its tokens, and where each of them comes from."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from inference.engine.counters import Counters, DraftedRound
from inference.engine.generation import Emission

Provenance = Literal["accepted", "corrected", "plain"]
"""Where a token comes from: drafted and accepted; put by the full model after the accepted ones,
where the draft was wrong or ended; or decoded in a round that drafted nothing."""


@dataclass(frozen=True)
class Piece:
    """One new token of a text that is being continued."""

    index: int
    """Which continuation, in the order in which `Model.generate` returns them."""
    text: str
    """What became certain with the token; empty within a character of several tokens."""
    token: int
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and what the model continued it with."""

    prompt: str
    text: str
    """The new text, without the prompt."""
    tokens: list[int] = field(repr=False)
    """New token ids; the last is EOS where that ended the text."""
    provenance: list[Provenance] = field(repr=False)
    """Of each new token."""
    strategy: str
    """That decoded, every setting named that is not at its default."""
    counters: Counters = field(repr=False)
    """Of the whole call: all its continuations share them."""
    drafts: Counter[DraftedRound] = field(repr=False)
    """Of this continuation: its rounds that drafted, by tokens drafted, accepted, and why no more
    were; `describe_drafts` of `inference.engine.counters` sorts them by position, length and
    reason."""


def provenance(emission: Emission) -> list[Provenance]:
    """Return where each token of an emission comes from."""
    accepted: list[Provenance] = ["accepted"] * emission.accepted
    after: Provenance = "corrected" if emission.drafted else "plain"
    return accepted + [after] * (len(emission.tokens) - emission.accepted)
