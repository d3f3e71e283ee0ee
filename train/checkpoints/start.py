"""What a new run starts from: the weights of another run, or a checkpoint it branches off."""

import logging
from dataclasses import replace

from data.urls import Location, location
from models.checkpoint_format import (
    Manifest,
    checkpoint_steps,
    find_checkpoint,
)
from models.config import LlamaConfig
from models.exit_parts import ExitParts
from models.llama import Llama
from models.tensor_reader import TensorReader, check_tensors
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.compatibility import other_model
from train.checkpoints.verified import load_tensors, verify_together
from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)

Prefixes = tuple[str, ...]
OWN_EXITS, ROUTERS = "own_exits.", "routers."


def check_start(folder: Location, config: CheckpointConfig) -> None:
    """Refuse what a new run cannot start from because it is not there, before anything is built.

    Args:
        folder: The run's own checkpoints, from which it resumes if there are any.
        config: What a new run starts from.

    Raises:
        ValueError: If there is no such checkpoint; the message names those there are.
    """
    if not checkpoint_steps(folder):
        if config.resume_from:
            _find_step(location(config.resume_from), config.step)
        elif config.init_from:
            find_checkpoint(location(config.init_from), "checkpoint.init_from")


def branching_point(config: CheckpointConfig, runtime: Runtime) -> tuple[Location, Manifest]:
    """Return the checkpoint of another run that this one branches off, verified."""
    path = runtime.on_every_rank(lambda: _find_step(location(config.resume_from), config.step))
    path = runtime.gather(path)[0]
    found = verify_together(path, runtime)

    def check() -> tuple[Location, Manifest]:
        if isinstance(found, str):
            raise ValueError(found)
        if config.step and found.step != config.step:
            raise ValueError(
                f"checkpoint.step: {config.step}, but {path} is of step {found.step}, name that "
                "step or leave it out"
            )
        return path, found

    return runtime.on_every_rank(check)


def _find_step(run: Location, step: int) -> Location:
    """Return the checkpoint of a step in a run folder, or `run` itself if it is a checkpoint.

    Args:
        run: The folder.
        step: Optimizer steps done; 0: the newest.

    Raises:
        ValueError: If there is none; the message names those there are.
    """
    steps = checkpoint_steps(run / "checkpoints") or checkpoint_steps(run)
    if not step or not steps:
        return find_checkpoint(run, "checkpoint.resume_from")
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise ValueError(f"checkpoint.step: {step}, but {run} holds the steps {there}, name one")
    return steps[step]


def load_initial_weights(source: str, model: Llama, *, runtime: Runtime) -> None:
    """Load another run's weights: the tensors of the model alone.

    Exits' own parts that the other run lacks start as copies of its final norm and its last
    layer's feed-forward, as in EE-Tuning (arXiv 2402.00518). Routers that it lacks start as in a
    new model: every token runs, so that the output is the other model's.

    Raises:
        ValueError: On rank 0, if there is no intact checkpoint, or its model has another shape.
        SystemExit: On the other ranks then.
    """
    path = runtime.on_every_rank(lambda: find_checkpoint(location(source), "checkpoint.init_from"))
    path = runtime.gather(path)[0]
    found = verify_together(path, runtime)
    state, shape, new = model.state_dict(), model.config, Prefixes()
    if isinstance(found, Manifest):
        shape, new = _without_new_parts(model.config, found.model)
    state = {name: value for name, value in state.items() if not name.startswith(new)}

    def check() -> None:
        if isinstance(found, str):
            raise ValueError(found)
        if not shape.has_weights_of(found.model):
            raise ValueError(
                f"checkpoint.init_from: {path} {other_model(found.model, shape)}; "
                "configure that model or name another run"
            )
        check_tensors(TensorReader(path), "model.", state)

    runtime.on_every_rank(check)
    load_tensors(path, {"model": state}, runtime)
    logger.info("checkpoint: starting from the weights of %s", path)
    assert isinstance(found, Manifest)
    if found.model.max_seq_len != shape.max_seq_len:
        logger.info(
            "checkpoint: they were trained with a context of %d tokens, and go on with %d",
            found.model.max_seq_len,
            shape.max_seq_len,
        )
    _start_new_parts(model, new)


def _start_new_parts(model: Llama, new: Prefixes) -> None:
    """Set the parts that the other run lacks."""
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
