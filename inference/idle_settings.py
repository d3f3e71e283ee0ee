"""A setting that would change nothing is an error, not a surprise."""

from typing import Any


def idle_problems(strategy: Any, names: tuple[str, ...], *, without: str) -> list[str]:
    """Return a line for each of these settings that is not at its default.

    Args:
        strategy: A dataclass of settings, of which these have no effect as the others are.
        names: The settings.
        without: What it would take, as one writes it.
    """
    return [
        f"{name}: {getattr(strategy, name)}, has no effect without {without}"
        for name in names
        if getattr(strategy, name) != getattr(type(strategy), name)
    ]
