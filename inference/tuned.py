"""What the tuner found for a checkpoint, kept beside it; `generate` decodes with it by default."""

import json
from pathlib import Path
from typing import Any

from inference.adapters import decode_folder
from inference.run import Run
from models.fingerprint import weights_fingerprint


def tuned_path(run: Run) -> Path:
    """Return where the tuned strategy of a checkpoint is kept."""
    return decode_folder(run.checkpoint) / "tuned.json"


def write_tuned(run: Run, strategy: str, found: dict[str, Any]) -> Path:
    """Write a strategy, as text, and what led to it."""
    path = tuned_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"strategy": strategy, "weights": weights_fingerprint(run.model), **found}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read_tuned(run: Run) -> str | None:
    """Return the tuned strategy of a checkpoint as text; None if there is none.

    Raises:
        ValueError: the file is damaged or belongs to other weights.
    """
    path = tuned_path(run)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        strategy, weights = str(content["strategy"]), content["weights"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"tuned: {path} is damaged, delete it or run inference.tune") from None
    if weights != weights_fingerprint(run.model):
        raise ValueError(
            f"tuned: {path} belongs to another checkpoint, delete it or run inference.tune"
        )
    return strategy
