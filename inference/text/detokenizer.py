"""Text as it comes: tokens in, whole characters out."""

from data.tokenizer import Tokenizer

_TORN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes a growing row; a character of several byte tokens comes with the last of them.

    The whole row is decoded each time, because what a token's text is may depend on the tokens
    before it.

    Args:
        tokenizer: The model's.
        prompt: Token ids of which no text is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._returned = len(tokenizer.decode(self._ids))
        """Characters of the row's text."""

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self._ids.append(token)
        return self._beyond(self._tokenizer.decode(self._ids).rstrip(_TORN))

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character."""
        return self._beyond(self._tokenizer.decode(self._ids))

    def _beyond(self, text: str) -> str:
        new = text[self._returned :]
        self._returned += len(new)
        return new
