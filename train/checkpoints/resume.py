"""Resume from a checkpoint: chosen by rank 0, verified by all ranks, loaded in place.

The newest one that verifies is loaded, else the next older. Where there are some and none
verifies, training stops instead of silently starting at step 0.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from models.checkpoint_format import (
    Manifest,
    check_content,
    check_listing,
    checkpoint_steps,
    find_checkpoint,
)
from models.config import LlamaConfig
from models.exit_parts import ExitParts
from models.llama import Llama
from models.tensor_reader import TensorReader, check_tensors
from train.checkpoints.checkpointer import CheckpointConfig
from train.checkpoints.compatibility import (
    check_config,
    check_identity,
    check_optimizer,
    other_model,
)
from train.checkpoints.content import RunIdentity, Tensors, training_tensors
from train.checkpoints.folder import ABANDONED, DAMAGED, clean_up, first_failure, set_aside
from train.parallel.runtime import Runtime
from train.parallel.titan import OptimizersContainer

logger = logging.getLogger(__name__)

Prefixes = tuple[str, ...]
OWN_EXITS, ROUTERS = "own_exits.", "routers."


@dataclass(frozen=True)
class Resumed:
    """The point at which training resumes."""

    t: int
    """Optimizer steps done; 0 where there is no checkpoint yet."""
    state: dict[str, Any]
    """The `state` passed to `CheckpointWriter.save`."""


def resume(
    folder: Path,
    model: Llama,
    optimizer: OptimizersContainer,
    *,
    config: CheckpointConfig,
    identity: RunIdentity,
    runtime: Runtime,
) -> Resumed:
    """Load the newest intact checkpoint of this run into model and optimizer, in place.

    Raises:
        ValueError: On rank 0, if none is intact, or it is of another model, tokenizer, dataset or
            configuration.
        SystemExit: On the other ranks then.
    """
    runtime.on_every_rank(lambda: clean_up(folder) if runtime.is_main else None)
    found = newest_intact(folder, runtime)
    if found is None:
        return Resumed(0, {})
    path, manifest = found

    tensors = training_tensors(model, optimizer)

    def check() -> None:
        check_identity(path, manifest, identity)
        check_optimizer(path, tensors["optimizer"])
        check_config(manifest, identity.config, allow=config.allow_config_changes)

    runtime.on_every_rank(check)
    _load(path, tensors, runtime)
    logger.info("checkpoint: resuming from %s, step %d", path, manifest.step)
    return Resumed(manifest.step, manifest.state)


def load_earlier(
    folder: Path,
    model: Llama,
    optimizer: OptimizersContainer,
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

    def abandon() -> tuple[Path, Manifest]:
        if found is None:
            raise ValueError(
                f"checkpoint: {folder} holds none of step {last_step} or before to roll back to, "
                "lower checkpoint.interval_steps or raise checkpoint.keep_latest"
            )
        check_identity(*found, identity)
        for path in list(checkpoint_steps(folder).values()) if runtime.is_main else ():
            if path > found[0]:
                set_aside(path, ABANDONED)
        return found

    path, manifest = runtime.on_every_rank(abandon)
    _load(path, training_tensors(model, optimizer), runtime)
    logger.warning("checkpoint: rolled back to %s, step %d", path, manifest.step)
    return Resumed(manifest.step, manifest.state)


def load_initial_weights(source: str, model: Llama, *, runtime: Runtime) -> None:
    """Load another run's weights: the tensors of the model alone.

    Exits' own parts that the other run lacks start as copies of its final norm and its last
    layer's feed-forward, as in EE-Tuning (arXiv 2402.00518). Routers that it lacks start as in a
    new model: every token runs, so that the output is the other model's.

    Raises:
        ValueError: On rank 0, if there is no intact checkpoint, or its model has another shape.
        SystemExit: On the other ranks then.
    """
    path = runtime.on_every_rank(lambda: find_checkpoint(Path(source), "checkpoint.init_from"))
    path = runtime.gather(path)[0]
    found = verify_together(path, runtime)
    state, shape, new = model.state_dict(), model.config, Prefixes()
    if isinstance(found, Manifest):
        shape, new = _without_new_parts(model.config, found.model)
    state = {name: value for name, value in state.items() if not name.startswith(new)}

    def check() -> None:
        if isinstance(found, str):
            raise ValueError(found)
        if found.model != shape:
            raise ValueError(
                f"checkpoint.init_from: {path} {other_model(found.model, shape)}; "
                "configure that model or name another run"
            )
        check_tensors(TensorReader(path), "model.", state)

    runtime.on_every_rank(check)
    _load(path, {"model": state}, runtime)
    logger.info("checkpoint: starting from the weights of %s", path)
    if ROUTERS in new:
        logger.info("checkpoint: the routers, which it lacks, start by letting every token run")
    if OWN_EXITS in new:
        last = model.block(model.config.n_layers - 1)
        for parts in model.own_exits.values():
            assert isinstance(parts, ExitParts)
            parts.copy_from(model.norm, last)
        logger.info(
            "checkpoint: the exits E = %s, which it lacks, start as copies of %s",
            ", ".join(map(str, model.config.own_exits)),
            "its last layer's feed-forward and its final norm"
            if model.config.own_exit_mlp
            else "its final norm",
        )


def _without_new_parts(config: LlamaConfig, start: LlamaConfig) -> tuple[LlamaConfig, Prefixes]:
    """Return a model's shape without the parts that `start` lacks, and their names' prefixes."""
    new: Prefixes = ()
    if config.own_exits and not start.own_exits:
        config, new = replace(config, own_exits=(), own_exit_mlp=False), (*new, OWN_EXITS)
    if config.router != "none" and start.router == "none":
        config, new = replace(config, router="none"), (*new, ROUTERS)
    return config, new


def newest_intact(
    folder: Path, runtime: Runtime, *, last_step: int | None = None
) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies, or None where there is none at all.

    Newer ones, all damaged, are set aside as step-*.damaged, so that they neither count as kept
    nor are verified again. Rank 0 lists the folder; all ranks verify.

    Args:
        folder: The run's checkpoints.
        runtime: This rank.
        last_step: Consider those of at most this many steps; None: all.

    Raises:
        ValueError: On rank 0, if there are checkpoints and every one is damaged.
        SystemExit: On the other ranks then.
    """
    steps = runtime.gather(checkpoint_steps(folder) if runtime.is_main else {})[0]
    eligible = [step for step in steps if last_step is None or step <= last_step]
    damaged: list[Path] = []

    def put_aside() -> None:
        for bad in damaged if runtime.is_main else ():
            set_aside(bad, DAMAGED)

    for step in reversed(eligible):
        path = steps[step]
        found = verify_together(path, runtime)
        if isinstance(found, Manifest) and found.step != step:
            found = f"checkpoint: {path} holds step {found.step}, use another checkpoint"
        if isinstance(found, Manifest):
            runtime.on_every_rank(put_aside)
            return path, found
        if runtime.is_main:
            logger.warning("%s", found)
        damaged.append(path)

    def refuse() -> None:
        if damaged:
            raise ValueError(
                f"checkpoint: none of the {len(damaged)} in {folder} is intact, "
                "remove the folder to start from step 0"
            )

    runtime.on_every_rank(refuse)
    return None


def verify_together(path: Path, runtime: Runtime) -> Manifest | str:
    """Compare a checkpoint with its manifest, each rank reading a share of the files.

    Returns:
        The manifest as rank 0 reads it, or the first problem, the same on every rank.
    """

    def listing() -> Manifest | str:
        try:
            return check_listing(path)
        except (ValueError, OSError) as error:
            return str(error)

    def content(manifest: Manifest) -> str:
        share = sorted(manifest.files)[runtime.rank :: runtime.world_size]
        try:
            check_content(path, manifest, share)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    found = runtime.gather(listing() if runtime.is_main else "")[0]
    if isinstance(found, str):
        return found
    problems = [text for text in runtime.gather(content(found)) if text]
    return problems[0] if problems else found


def _load(path: Path, tensors: Tensors, runtime: Runtime) -> None:
    """Load a checkpoint into these tensors, which the model and the optimizer share."""

    def read() -> None:
        try:
            load(tensors, storage_reader=TensorReader(path))
        except CheckpointException as error:  # on every rank
            raise ValueError(
                f"checkpoint: {path} could not be loaded ({first_failure(error)}), "
                "use another checkpoint"
            ) from error

    runtime.on_every_rank(read)
