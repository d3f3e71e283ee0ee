"""Text of others made visible: no character of it can act on the page or hide on it."""

import unicodedata
from html import escape
from itertools import groupby

from data.tokenizer import Tokenizer

_SIGNS = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\u21e5"}
_TORN = "\N{REPLACEMENT CHARACTER}"
_MARKS = 4
"""Most combining characters in a row that are drawn."""


def visible(text: str, *, keep: str = "") -> str:
    r"""Return text with controls, bidi marks and the like written out, as in \u202e.

    Args:
        text: Of anyone.
        keep: Controls that stay, such as a newline.
    """
    found, marks = [], 0
    for char in text:
        kind = unicodedata.category(char)
        marks = marks + 1 if kind[0] == "M" else 0
        if char in keep:
            found.append(char)
        elif kind[0] == "C" or kind in ("Zl", "Zp"):
            found.append(f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")
        elif marks == 1 and len(found) == 0:
            found.append("\N{DOTTED CIRCLE}" + char)
        elif marks <= _MARKS:
            found.append(char)
    return "".join(found)


def safe(text: str, limit: int = 300) -> str:
    """Return text of others for HTML, also within quotes, cut at `limit` characters."""
    shown = visible(text[:limit])
    return escape(shown + "\N{HORIZONTAL ELLIPSIS}" * (len(text) > limit))


def with_signs(text: str) -> str:
    """Return a token's text with signs for white space at its ends, the rest made visible."""
    body = text.strip(" \n\t")
    start = len(text) - len(text.lstrip(" \n\t"))
    head, tail = text[:start], text[start + len(body) :]
    return _signs(head) + visible(body) + _signs(tail)


def _signs(spaces: str) -> str:
    """Return white space as signs, many of a kind as a number."""
    found = ""
    for char, group in groupby(spaces):
        count = len([*group])
        found += (
            _SIGNS[char] * count if count < 4 else f"{_SIGNS[char]}\N{MULTIPLICATION SIGN}{count}"
        )
    return found


class TokenTexts:
    """The text of single tokens.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")
        self._before = len(tokenizer.decode(self._anchor))
        self._names = {number: name for name, number in tokenizer.special.items()}
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Return a token's text within a text; of half a character or a control token its name."""
        if token not in self._known:
            text = self._tokenizer.decode([*self._anchor, token])[self._before :]
            if not text or _TORN in text:
                text = self._names.get(token, f"<{token}>")
            self._known[token] = text
        return self._known[token]
