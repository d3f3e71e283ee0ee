"""The text of one continuation as it becomes certain: whole characters, up to a stop text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from data.tokenizer import Tokenizer
from inference.engine.generation import Emission
from inference.text.continuation import Provenance, provenance
from inference.text.detokenizer import Detokenizer

Ending = Literal["stop", "length"]
"""Why a text ended: at EOS or a stop text, or at its limit."""


@dataclass(frozen=True)
class Span:
    """The text that came with a token; empty within a character of several tokens."""

    text: str
    source: Provenance


class Reply:
    """Cuts the tokens of one continuation into text that can be sent.

    Text that may turn out to be the beginning of a stop text is held back until it is certain.

    Args:
        tokenizer: The model's.
        prompt: Token ids of which no text is returned.
        limit: Tokens after which it ends.
        stop_tokens: Ids that end it, and have no text.
        stop: Texts that end it, and are left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        limit: int,
        stop_tokens: Collection[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, list(prompt))
        self._limit, self._stop_tokens, self._stop = limit, frozenset(stop_tokens), stop
        self._held: list[Span] = []
        self.tokens = 0
        """New tokens, a stop token and that which completes a stop text included."""
        self.drafted = self.accepted = 0
        self.ending: Ending | None = None

    def push(self, emission: Emission) -> list[Span]:
        """Add the tokens of a round; return the text that is now certain, token by token."""
        ready: list[Span] = []
        self.drafted += emission.drafted
        self.accepted += emission.accepted
        for token, source in zip(emission.tokens, provenance(emission), strict=True):
            self.tokens += 1
            text = self._detokenizer.push(token)
            if token in self._stop_tokens:
                self.ending = "stop"
            elif self.tokens == self._limit:
                self.ending = "length"
            if self.ending:
                text += self._detokenizer.finish()
            self._held.append(Span(text, source))
            ready += self._release()
            if self.ending:
                break
        return ready

    def _release(self) -> list[Span]:
        """Return what is certain of the text held back, and end it at a stop text."""
        text = "".join(span.text for span in self._held)
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.ending = "stop"
            certain = min(found)
        else:
            certain = len(text) if self.ending else len(text) - _longest_start(text, self._stop)
        ready = []
        while self._held and (certain or not self._held[0].text):
            span = self._held.pop(0)
            ready.append(Span(span.text[:certain], span.source))
            if len(span.text) > certain:
                self._held.insert(0, Span(span.text[certain:], span.source))
            certain -= len(ready[-1].text)
        return ready


def _longest_start(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    longest = max(map(len, stops), default=1) - 1
    return next(
        (
            n
            for n in range(min(longest, len(text)), 0, -1)
            if any(stop.startswith(text[-n:]) for stop in stops)
        ),
        0,
    )
