"""Text as it comes: tokens in, whole characters out."""

from data.tokenizer import Tokenizer

_TORN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a growing row; a character of several byte tokens appears with its last.

    The whole row is decoded each time, because what a token's text is may depend on the tokens
    before it.

    Args:
        tokenizer: The model's.
        prompt: Token ids whose text is not to be given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        """Take the prompt as given out; see the class."""
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._given = len(tokenizer.decode(self._ids))

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self._ids.append(token)
        return self._give(self._tokenizer.decode(self._ids).rstrip(_TORN))

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given += len(new)
        return new
