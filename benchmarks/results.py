"""Results of measurements that take turns: ratios of pairs, and JSON of several runs."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of above / below, pair by pair: each pair was measured in turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def write_beside(path: Path | None, name: str, numbers: dict[str, Any]) -> None:
    """Write the numbers of one run to a JSON file, beside those of others; None: do not."""
    if path is None:
        return
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: numbers}, indent=1) + "\n")
