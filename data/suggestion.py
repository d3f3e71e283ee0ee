"""What a mistyped name was meant to be."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches


def suggest(
    name: str,
    known: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    *,
    prefix: str = "",
) -> str:
    """Return a hint at what `name` was meant to be.

    Args:
        name: What was typed.
        known: All that exists.
        synonyms: {what people type: one of `known`, or what to do instead}.
        prefix: Of all these names, where they are written in the hint.
    """
    near = _nearest(name, known, synonyms or {})
    if near and near[0] not in known:
        return near[0]
    names = [prefix + other for other in near or known]
    if near:
        return f"did you mean {'one of ' if len(names) > 1 else ''}{', '.join(names)}?"
    return f"give one of {', '.join(names)}" if len(names) < 20 else "see --help"


def _nearest(name: str, known: Sequence[str], synonyms: Mapping[str, str]) -> list[str]:
    """Return what is meant by `name`: one or several of `known`, or the entry of a synonym.

    A word that ends the name of an option, as in `lr` for `optim.lr`, means that one.
    """
    if name in synonyms:
        return [synonyms[name]]
    section, _, last = name.rpartition(".")
    if section and (near := get_close_matches(name, known, n=1, cutoff=0.8)):
        return near
    if near := get_close_matches(last, synonyms, n=1, cutoff=0.9):
        return [synonyms[near[0]]]
    tails = {option.rpartition(".")[2]: option for option in reversed(known)}
    if last in tails:
        return [option for option in known if option.rpartition(".")[2] == last]
    near = get_close_matches(name, known, n=1)
    if near or len(last) < 3:  # two letters are like too many words
        return near
    return [tails[tail] for tail in get_close_matches(last, tails, n=1)]
