"""Resume from a checkpoint: chosen by rank 0, verified by all ranks, loaded in place.

The newest one that verifies is loaded, else the next older.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from data.urls import Location
from models.checkpoint_format import Manifest, checkpoint_steps
from models.llama import Llama
from models.tensor_reader import holds_average
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.compatibility import (
    check_config,
    check_identity,
    check_optimizer,
    check_origin,
    check_steps,
)
from train.checkpoints.content import RunIdentity, Tensors, training_tensors
from train.checkpoints.folder import ABANDONED
from train.checkpoints.folders import folder_at
from train.checkpoints.start import branching_point, load_initial_weights
from train.checkpoints.verified import load_tensors, newest_intact
from train.optimizer.optim import Optimizers
from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The point at which training resumes."""

    t: int
    """Optimizer steps done; 0 where there is no checkpoint yet."""
    state: dict[str, Any]
    """The `state` passed to `CheckpointWriter.save`."""
    manifest: Manifest | None = None
    """Of the checkpoint; None where there is none."""
    branched_from: str = ""
    """The run it is of, where that is another; else empty."""


def resume(
    folder: Location,
    model: Llama,
    optimizer: Optimizers,
    *,
    config: CheckpointConfig,
    identity: RunIdentity,
    runtime: Runtime,
    given: Collection[str] = (),
) -> Resumed:
    """Load the newest intact checkpoint of this run, or of the one it branches off, in place.

    Args:
        folder: The run's checkpoints.
        model: The model.
        optimizer: Its optimizer.
        config: What a new run starts from, and whether the configuration may change.
        identity: The run's model, configuration and data.
        runtime: This rank.
        given: The fields that the user has given, see `check_config`.

    Raises:
        ValueError: On rank 0, if none is intact, or it is of another model, tokenizer, dataset or
            configuration.
        SystemExit: On the other ranks then.
    """
    runtime.on_every_rank(lambda: folder_at(folder).clean_up() if runtime.is_main else None)
    found, branched_from = newest_intact(folder, runtime), ""
    if found is None and config.resume_from:
        found, branched_from = branching_point(config, runtime), config.resume_from
    if found is None:
        _begin(config, model, optimizer, runtime)
        return Resumed(0, {})
    path, manifest = found
    tensors = training_tensors(model, optimizer)
    allow = bool(branched_from) or config.allow_config_changes

    def check() -> None:
        if not branched_from:
            check_origin(folder, manifest, config)
        check_identity(path, manifest, identity)
        check_optimizer(path, tensors["optimizer"])
        check_steps(manifest, identity.config, given=given, more=bool(branched_from))
        check_config(path, manifest, identity, given=given, allow=allow)

    runtime.on_every_rank(check)
    _load(path, tensors, optimizer, runtime)
    _log_start(path, manifest.step, branched_from)
    return Resumed(manifest.step, manifest.state, manifest, branched_from)


def _begin(config: CheckpointConfig, model: Llama, optimizer: Optimizers, runtime: Runtime) -> None:
    if config.init_from:
        load_initial_weights(config.init_from, model, runtime=runtime)
    if optimizer.average is not None:
        optimizer.average.restart()


def _load(path: Location, tensors: Tensors, optimizer: Optimizers, runtime: Runtime) -> None:
    """Load all state of a checkpoint; an average that it lacks starts at its weights."""
    if optimizer.average is None or holds_average(path):
        load_tensors(path, tensors, runtime)
        return
    load_tensors(path, {name: part for name, part in tensors.items() if name != "ema"}, runtime)
    optimizer.average.restart()
    logger.info("checkpoint: %s holds no average of its weights, it starts at these", path)


def _log_start(path: Location, step: int, branched_from: str) -> None:
    begins = "branching off" if branched_from else "resuming from"
    logger.info("checkpoint: %s %s, step %d", begins, path, step)


def load_earlier(
    folder: Location,
    model: Llama,
    optimizer: Optimizers,
    *,
    last_step: int,
    identity: RunIdentity,
    runtime: Runtime,
) -> Resumed:
    """Load the newest intact checkpoint of at most `last_step` steps, in place.

    The newer ones are set aside as step-*.abandoned, so that no restart resumes from them. None
    may be in flight.

    Raises:
        ValueError: On rank 0, if there is none.
        SystemExit: On the other ranks then.
    """
    found = newest_intact(folder, runtime, last_step=last_step)

    def abandon() -> tuple[Location, Manifest]:
        if found is None:
            raise ValueError(
                f"checkpoint: {folder} holds none of step {last_step} or before to roll back to, "
                "lower checkpoint.interval_steps or raise checkpoint.keep_latest"
            )
        check_identity(*found, identity)
        for step, path in checkpoint_steps(folder).items() if runtime.is_main else ():
            if step > found[1].step:
                folder_at(folder).set_aside(path.name, ABANDONED)
        return found

    path, manifest = runtime.on_every_rank(abandon)
    _load(path, training_tensors(model, optimizer), optimizer, runtime)
    logger.warning("checkpoint: rolled back to %s, step %d", path, manifest.step)
    return Resumed(manifest.step, manifest.state, manifest)
