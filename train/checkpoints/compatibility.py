"""Check whether a run may resume from a checkpoint: same model, data and configuration."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.checkpoint_format import Manifest
from models.config import LlamaConfig
from models.tensor_reader import TensorReader
from train.checkpoints.content import RunIdentity

logger = logging.getLogger(__name__)

# May differ without affecting the result: paths, monitoring, how it is computed.
_HARMLESS = (
    *("name", "output_dir", "data.path", "data.also", "data.input"),
    *("data.microbatch_size", "data.verify_shards", "early_exit.chunk_rows"),
)
_HARMLESS_SECTIONS = (
    *("metrics.", "validate.", "checkpoint.", "recovery.", "adam_monitor.", "replica_check."),
    *("stragglers.", "runtime.", "parallel."),
)
_HARMFUL = ("parallel.param_dtype", "parallel.reduce_dtype", "parallel.float8")
_ABSENT = object()


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield the fields in which two resolved configurations differ: (field, how)."""
    for name in {**old, **new}:
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before is _ABSENT:
            yield prefix + name, f"is new, {after}"
        elif after is _ABSENT:
            yield prefix + name, f"was {before}, is gone"
        elif before != after:
            yield prefix + name, f"was {before}, is {after}"


def is_harmless(field: str) -> bool:
    """Whether a run may resume with another value of this field of the configuration."""
    if field in _HARMFUL:
        return False
    return field in _HARMLESS or field.startswith(_HARMLESS_SECTIONS)


def check_config(manifest: Manifest, config: dict[str, Any], *, allow: bool) -> None:
    """Log the changes of the configuration, and refuse those that affect the result.

    Args:
        manifest: Of the checkpoint to resume from.
        config: The resolved configuration to resume with.
        allow: Refuse nothing.

    Raises:
        ValueError: Naming every refused field, one line each.
    """
    refused = []
    for field, how in differences(manifest.config, config):
        # A field that only one of the two versions has is no change by the user.
        if allow or is_harmless(field) or how.startswith("is new") or how.endswith("is gone"):
            logger.warning("config: %s %s from step %d on", field, how, manifest.step)
        else:
            refused.append(
                f"{field}: {how}, restore the old value, choose another --name, or resume from "
                f"step {manifest.step} like this with --checkpoint.allow_config_changes True"
            )
    if refused:
        raise ValueError("\n".join(refused))


def other_model(stored: LlamaConfig, configured: LlamaConfig) -> str:
    """Describe the fields in which the model of a checkpoint differs from the configured one."""
    differing = [
        f"model.{name} {getattr(stored, name)} (configured: {value})"
        for name, value in vars(configured).items()
        if getattr(stored, name) != value
    ]
    return f"is of another model, with {', '.join(differing)}"


def check_identity(path: Path, manifest: Manifest, identity: RunIdentity) -> None:
    """Refuse a checkpoint of another model, tokenizer or dataset.

    Raises:
        ValueError: Naming the difference.
    """
    if manifest.model != identity.model:
        raise ValueError(
            f"name: {path} {other_model(manifest.model, identity.model)}; "
            "choose another --name or the configuration it was trained with"
        )
    for kind in ("tokenizer_fingerprint", "data_fingerprint"):
        if getattr(manifest, kind) != getattr(identity, kind):
            raise ValueError(
                f"name: {path} was trained on other data ({kind} {getattr(manifest, kind)[:12]}, "
                f"now {getattr(identity, kind)[:12]}), choose another --name or restore that data"
            )


def check_optimizer(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint with the moments of another optimizer.

    Args:
        path: The checkpoint.
        tensors: The state of this run's optimizer, by its names in a checkpoint.

    Raises:
        ValueError: Naming a tensor of the other optimizer.
    """
    prefix = "optimizer."
    stored = {
        name.removeprefix(prefix)
        for name in TensorReader(path).read_metadata().state_dict_metadata
        if name.startswith(prefix)
    }
    if others := sorted(stored - set(tensors)):
        raise ValueError(
            f"optim.name: {path} is of another optimizer, with {others[0]}, restore that one, "
            f"or start from its weights with another --name and --checkpoint.init_from {path}"
        )
