"""Where numbers come from: the command, the machine and the date behind them."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = "python -m inference.report"
"""The command of what is measured for the report; its options stand in the last section."""
LONGEST = 300
"""Characters of a text that is not ours."""


@dataclass(frozen=True)
class Source:
    """How some numbers were measured."""

    command: str
    """As it is typed."""
    how: str
    """How often, over what."""
    machine: str = ""
    """Processor, threads, torch; empty where the numbers do not depend on it or it is not kept."""
    date: str = ""


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return what `inference.loading.machine.machine` returned, or a file kept of it, as text."""
    threads = machine.get("threads")
    parts = [
        str(machine.get("gpu") or machine.get("cpu") or "unknown processor"),
        f"{threads} thread{'s' * (threads != 1)}" if isinstance(threads, int) else "",
        f"torch {machine['torch']}" if "torch" in machine else "",
    ]
    return ", ".join(part for part in parts if part)[:LONGEST]


def date_of(machine: Mapping[str, Any]) -> str:
    """Return the date in the same."""
    return str(machine.get("date", ""))[:10]


def file_date(path: Path) -> str:
    """Return the day a file was written, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))


def number(value: float | None, form: str = ".3g", unit: str = "") -> str:
    """Return a number for a reader; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return format(value, form) + unit
