"""Check whether a run may resume from a checkpoint: same model, data and configuration."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from os.path import normpath
from typing import Any

from torch import Tensor

from data.batch_ramp import BatchRamp
from data.urls import Location
from models.checkpoint_format import Manifest
from models.config import LlamaConfig
from models.tensor_reader import TensorReader
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.content import RunIdentity

logger = logging.getLogger(__name__)

# May differ without affecting the result: paths, monitoring, how it is computed.
_HARMLESS = (
    *("name", "output_dir", "data.path", "data.also", "data.input"),
    *("data.microbatch_size", "data.verify_shards", "early_exit.chunk_rows"),
)
_HARMLESS_SECTIONS = (
    *("metrics.", "validate.", "speculation.", "checkpoint.", "recovery.", "adam_monitor."),
    *("replica_check.", "stragglers.", "profile.", "runtime.", "parallel."),
)
# An everyday wish: may differ where the user has given it, so that an option that was forgotten on
# resuming is no change.
_PLAIN = (
    *(
        "steps",
        "data.weights",
        "data.global_batch_size",
        "data.ramp_start",
        "data.ramp_increment",
        "data.ramp_steps",
        "data.seq_len",
        "data.packing",
    ),
    *("data.mask_documents", "model.max_seq_len"),
)
_SOURCES = {"data.path", "data.also"}
# Said where they are used.
_OWN = ("checkpoint.resume_from", "checkpoint.step", "checkpoint.allow_config_changes")
_HARMFUL = ("parallel.param_dtype", "parallel.reduce_dtype", "parallel.float8")
ABSENT = object()
"""The value of a field that a configuration lacks."""


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Yield the fields in which two resolved configurations differ: (field, old, new).

    A field that only one of them has is ABSENT in the other.
    """
    for name in {**old, **new}:
        before, after = old.get(name, ABSENT), new.get(name, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield prefix + name, before, after


def _change(before: object, after: object) -> str:
    if before is ABSENT:
        return f"is new, {after}"
    return f"was {before}, " + ("is gone" if after is ABSENT else f"is {after}")


def _option(field: str, value: object) -> str:
    """Return the words that give a field a value on the command line."""
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{field}", *map(str, values)])


def is_harmless(field: str) -> bool:
    """Whether a run may resume with another value of this field of the configuration."""
    if field in _HARMFUL:
        return False
    return field in _HARMLESS or field.startswith(_HARMLESS_SECTIONS)


def check_config(
    path: Location,
    manifest: Manifest,
    identity: RunIdentity,
    *,
    given: Collection[str] = (),
    allow: bool,
) -> None:
    """Log the changes of the configuration, and refuse those that affect the result unawares.

    Args:
        path: The checkpoint to resume from.
        manifest: Its manifest.
        identity: The run, with the resolved configuration to resume with.
        given: The fields that the user has given: of these, steps, batches and data may change.
        allow: Refuse nothing.

    Raises:
        ValueError: Naming every refused field, one line each.
    """
    config, same_data = identity.config, manifest.data_fingerprint == identity.data_fingerprint
    changes = [c for c in differences(manifest.config, config) if c[0] not in _OWN]
    if not same_data and not {field for field, *_ in changes} & _SOURCES:
        raise ValueError(_other_data(path, "data_fingerprint", manifest, identity))
    refused, accepted = [], []
    for field, before, after in changes:
        how = _change(before, after)
        plain = field in _PLAIN or (field in _SOURCES and not same_data)
        # A field that only one of the two versions has is no change by the user.
        one_version = before is ABSENT or after is ABSENT
        if allow or one_version or (field in given if plain else is_harmless(field)):
            accepted.append(f"{field} {how}")
        elif plain:
            refused.append(
                f"{field}: {how}, give {_option(field, before)} to go on as before, or "
                f"{_option(field, after)} to change it from step {manifest.step} on"
            )
        else:
            refused.append(
                f"{field}: {how}, restore the old value, choose another --name, or resume from "
                f"step {manifest.step} like this with --checkpoint.allow_config_changes True"
            )
    if refused:
        raise ValueError("\n".join(refused))
    for change in accepted:
        logger.info("config: %s from step %d on", change, manifest.step)


def check_steps(
    manifest: Manifest, config: dict[str, Any], *, given: Collection[str], more: bool
) -> None:
    """Refuse fewer steps than are done, and --tokens where steps were of another size.

    Args:
        manifest: Of the checkpoint to go on from.
        config: The resolved configuration to go on with.
        given: The fields that the user has given.
        more: Refuse as many, too.

    Raises:
        ValueError: Naming the steps to give.
    """
    done, steps = manifest.step, config["steps"]
    if "tokens" in given:
        batch, seq_len = _batch(config), config["data"]["seq_len"]
        before = _batch(manifest.config).before(done) * manifest.config["data"]["seq_len"]
        read = manifest.state.get("tokens", before)
        rows = math.ceil((batch.before(steps) * seq_len - read) / seq_len)
        right = max(batch.steps_for(batch.before(done) + rows), done)
        if right != steps:
            raise ValueError(
                f"tokens: {read:,} were read in {done} steps, of another size than the "
                f"{batch.at(done) * seq_len:,} now, give --steps {right} in place of --tokens"
            )
    if steps < done + more:
        least = "more" if more else "at least as many"
        raise ValueError(f"steps: {steps}, but {done} are done, give {least}")


def _batch(config: dict[str, Any]) -> BatchRamp:
    data = config["data"]
    ramp = (data.get(f"ramp_{name}", 0) for name in ("start", "increment", "steps"))
    return BatchRamp(data["global_batch_size"], *ramp)


def other_model(stored: LlamaConfig, configured: LlamaConfig) -> str:
    """Describe the fields in which the model of a checkpoint differs from the configured one."""
    differing = [
        f"model.{name} {getattr(stored, name)} (configured: {value})"
        for name, value in vars(configured).items()
        if getattr(stored, name) != value
    ]
    return f"is of another model, with {', '.join(differing)}"


def check_identity(path: Location, manifest: Manifest, identity: RunIdentity) -> None:
    """Refuse a checkpoint of another model or tokenizer.

    Raises:
        ValueError: Naming the difference.
    """
    if not identity.model.has_weights_of(manifest.model):
        raise ValueError(
            f"name: {path} {other_model(manifest.model, identity.model)}; "
            "choose another --name or the configuration it was trained with"
        )
    if manifest.tokenizer_fingerprint != identity.tokenizer_fingerprint:
        raise ValueError(_other_data(path, "tokenizer_fingerprint", manifest, identity))


def _other_data(path: Location, kind: str, manifest: Manifest, identity: RunIdentity) -> str:
    return (
        f"name: {path} was trained on other data ({kind} {getattr(manifest, kind)[:12]}, "
        f"now {getattr(identity, kind)[:12]}), choose another --name or restore that data"
    )


def check_origin(folder: Location, manifest: Manifest, config: CheckpointConfig) -> None:
    """Refuse a run that did not branch off `config.resume_from`, where that is set.

    Args:
        folder: The run's checkpoints.
        manifest: Of its own checkpoint.
        config: What the run is said to have branched off.

    Raises:
        ValueError: Naming what it began from.
    """
    resume_from, step = config.resume_from, config.step
    if not resume_from:
        return
    origin = manifest.state.get("origin")
    if origin and normpath(origin[0]) == normpath(resume_from) and step in (0, origin[1]):
        return
    run = folder.parent if folder.name == "checkpoints" else folder
    began = f"off step {origin[1]} of {origin[0]}" if origin else "at step 0"
    raise ValueError(
        f"checkpoint.resume_from: {resume_from}, but {run} began {began} and has done "
        f"{manifest.step} steps, choose another --name or leave checkpoint.resume_from out"
    )


def check_optimizer(path: Location, tensors: Mapping[str, Tensor]) -> None:
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
    if not stored:
        raise ValueError(
            f"checkpoint.resume_from: {path} holds weights alone, without moments, start from them "
            f"with --checkpoint.init_from {path}"
        )
    if others := sorted(stored - set(tensors)):
        raise ValueError(
            f"optim.name: {path} is of another optimizer, with {others[0]}, restore that one, "
            f"or start from its weights with another --name and --checkpoint.init_from {path}"
        )
