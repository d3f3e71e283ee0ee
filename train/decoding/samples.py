"""Samples of text as Markdown: a prompt, and its continuation by some exits and by all layers."""

import re
from collections.abc import Mapping

_NOT_SHOWN = "\N{REPLACEMENT CHARACTER}"


def sample_text(prompt: str, continuations: Mapping[str, str]) -> str:
    """Return one prompt's sample.

    Args:
        prompt: Its text.
        continuations: Their text, by who made it, such as "E=2".
    """
    parts = [("prompt", prompt), *continuations.items()]
    return "\n\n".join(f"**{name}**\n\n{_fenced(text)}" for name, text in parts)


def _fenced(text: str) -> str:
    """Return text as a block that shows it as it is, whatever it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = "".join(c if c.isprintable() or c in "\n\t" else _NOT_SHOWN for c in text)
    return f"{fence}text\n{shown}\n{fence}"
