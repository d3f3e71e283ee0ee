"""Results of `inference.tune` for a checkpoint, in a file beside it.

The fastest lossless strategy is the default of `generate`; a tuned threshold is the default of its
strategy.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.foreign_json import read_object, take
from data.output_streams import naming_the_file
from inference.engine.compiled import is_compiled
from inference.loading.adapters import decode_folder
from inference.loading.machine import processor
from inference.loading.run import Run
from models.fingerprint import weights_fingerprint


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions of a measurement, besides the checkpoint."""

    batch_size: int
    compiled: bool
    quantize: str | None
    dtype: str
    device: str
    """cpu or cuda."""
    processor: str
    """Model name of that CPU or GPU."""
    threads: int
    """Of torch, on the CPU."""
    temperature: float
    """0: greedy."""

    def differences(self, now: "Conditions") -> list[str]:
        """Return the conditions that differ now, one text each."""
        values = asdict(now)
        return [
            f"{name} {value} (now {values[name]})"
            for name, value in asdict(self).items()
            if value != values[name]
        ]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A result of tuning."""

    strategy: str | None
    """As text for `parse_strategy`; None: no threshold is useful."""
    conditions: Conditions


def conditions_of(
    run: Run, *, batch_size: int, quantize: str | None, temperature: float = 0.0
) -> Conditions:
    """Return the conditions under which a run decodes."""
    weight = run.model.norm.weight
    return Conditions(
        batch_size=batch_size,
        compiled=is_compiled(run.model),
        quantize=quantize,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        processor=processor(weight.device),
        threads=torch.get_num_threads(),
        temperature=temperature,
    )


def tuned_path(run: Run) -> Path:
    """Return the file of a checkpoint's tuning results."""
    return decode_folder(run.checkpoint) / "tuned.json"


def write_tuned(run: Run, name: str | None, tuned: Tuned, found: dict[str, Any]) -> Path:
    """Write a result and its measurements; results under other conditions stay.

    Args:
        run: The checkpoint.
        name: The strategy whose threshold was tuned; None: the fastest lossless strategy was
            searched for.
        tuned: The result.
        found: The measurements that led to it.
    """
    path = tuned_path(run)
    try:
        content = _read(run)
    except ValueError:  # damaged, or of other weights
        content = None
    content = content or {"lossless": [], "thresholds": {}}
    records = content["lossless"] if name is None else content["thresholds"].setdefault(name, [])
    conditions = asdict(tuned.conditions)
    records[:] = [r for r in records if r.get("conditions") != conditions]
    records.append({**asdict(tuned), **found})
    content["weights"] = weights_fingerprint(run.model)
    with naming_the_file("run", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read_tuned(run: Run, name: str | None, now: Conditions | None = None) -> Tuned | None:
    """Return the result under the conditions `now`, or else the newest; None if there is none.

    Args:
        run: The checkpoint.
        name: As in `write_tuned`.
        now: Conditions of the decoding to come.

    Raises:
        ValueError: The file is damaged or belongs to other weights.
    """
    content = _read(run)
    if content is None:
        return None
    records = content["lossless"] if name is None else content["thresholds"].get(name, [])
    try:
        found = [
            Tuned(
                strategy=take(record, "strategy", str | None),
                conditions=take(record, "conditions", Conditions),
            )
            for record in records
        ]
    except ValueError as error:
        raise _damaged(run, error) from None
    same = [tuned for tuned in found if tuned.conditions == now]
    newest = found[-1] if found else None
    return same[0] if same else newest


def lossless_records(run: Run) -> list[dict[str, Any]]:
    """Return the results of the search for lossless strategies, with their measurements.

    Raises:
        ValueError: The file is damaged or belongs to other weights.
    """
    content = _read(run)
    return [] if content is None else list(content["lossless"])


def _read(run: Run) -> dict[str, Any] | None:
    path = tuned_path(run)
    if not path.exists():
        return None
    try:
        content = read_object(path)
        weights = take(content, "weights", str)
        take(content, "lossless", Any)
        take(content, "thresholds", Any)
    except ValueError as error:
        raise _damaged(run, error) from None
    if weights != weights_fingerprint(run.model):
        raise ValueError(
            f"tuned: {path} belongs to another checkpoint, delete it or run inference.tune"
        )
    try:
        take(content, "lossless", list[dict[str, Any]])
        take(content, "thresholds", dict[str, list[dict[str, Any]]])
    except ValueError as error:
        raise _damaged(run, error) from None
    return content


def _damaged(run: Run, error: ValueError) -> ValueError:
    return ValueError(
        f"tuned: {tuned_path(run)} is damaged ({error}), delete it or run inference.tune"
    )
