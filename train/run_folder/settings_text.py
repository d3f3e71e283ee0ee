"""The settings of a run as text: those that differ from the preset as a table, then all."""

import json
from collections.abc import Mapping
from typing import Any


def settings_text(config: Mapping[str, Any], preset: Mapping[str, Any] | None) -> str:
    """Return Markdown.

    Args:
        config: The configuration.
        preset: The preset's; None where it is unknown.
    """
    whole = f"All settings:\n\n```json\n{json.dumps(config, indent=1)}\n```"
    if preset is None:
        return whole
    before = flat(preset)
    changed = [
        f"| {name} | {before.get(name, '')} | {value} |"
        for name, value in flat(config).items()
        if before.get(name) != value
    ]
    if not changed:
        return f"All settings are the preset's.\n\n{whole}"
    head = ["| setting | preset | this run |", "|---|---|---|"]
    return "\n".join([*head, *changed, "", whole])


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str | bool | int | float]:
    """Return nested fields by their full names; lists as words, nothing as "none"."""
    found: dict[str, str | bool | int | float] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            found[prefix + name] = " ".join(map(str, value)) or "none"
        else:
            found[prefix + name] = "none" if value is None else value
    return found
