"""Checkpoints: written aside, hashed, named last; read only after every file is verified.

All that a run must not forget is t, the weights and the optimizer's moments: the data order, the
curriculum, layer dropout and the learning rate are pure functions of t.
"""

import logging
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from models.checkpoint_format import (
    TOKENIZER,
    Manifest,
    TensorReader,
    check_tensors,
    checkpoint_steps,
    file_entry,
    find_checkpoint,
    verify,
)
from models.config import LlamaConfig
from models.llama import Llama
from train.runtime import Runtime
from train.titan import OptimizersContainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and what a new run starts from."""

    interval_steps: int = 500
    """Steps between checkpoints; the last step always writes one. 0: only the last."""
    keep_latest: int = 3
    """Finished checkpoints to keep; 0 keeps all."""
    init_from: str = ""
    """Run or checkpoint folder whose weights a new run starts from (continual training,
    finetuning). Empty: random weights. A run that has checkpoints of its own resumes from them."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        return [
            f"checkpoint.{name}: {getattr(self, name)}, must not be negative"
            for name in ("interval_steps", "keep_latest")
            if getattr(self, name) < 0
        ]


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint says of the run besides its tensors."""

    model: LlamaConfig
    config: dict[str, Any]
    tokenizer_path: Path
    tokenizer_fingerprint: str
    data_fingerprint: str


def save_checkpoint(
    folder: Path,
    t: int,
    model: Llama,
    optimizer: OptimizersContainer,
    *,
    identity: RunIdentity,
    runtime: Runtime,
) -> None:
    """Write `folder`/step-t; every rank calls this. The folder has its name only once whole.

    Raises:
        FloatingPointError: If a weight is not finite; nothing is written then.
    """
    _refuse_non_finite(model, t, runtime)
    final = folder / f"step-{t:08d}"
    aside = folder / f"step-{t:08d}.tmp"
    if runtime.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    runtime.gather(None)  # no rank writes before the folder is there
    save(_tensors(model, optimizer), storage_writer=FileSystemWriter(aside))
    own = {path.name: file_entry(path) for path in aside.glob(f"__{runtime.rank}_*.distcp")}
    entries = runtime.gather(own)
    if runtime.is_main:
        shutil.copyfile(identity.tokenizer_path, aside / TOKENIZER)
        files = {name: entry for rank in entries for name, entry in rank.items()}
        for name in (".metadata", TOKENIZER):
            files[name] = file_entry(aside / name)
        Manifest(
            step=t,
            model=identity.model,
            config=identity.config,
            tokenizer_fingerprint=identity.tokenizer_fingerprint,
            data_fingerprint=identity.data_fingerprint,
            world_size=runtime.world_size,
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "torchtitan", "sentencepiece")},
            files=files,
        ).write(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        logger.info("checkpoint: wrote %s", final)
    runtime.gather(None)  # no rank goes on before the checkpoint is whole


def delete_old_checkpoints(folder: Path, keep_latest: int) -> None:
    """Delete all but the newest `keep_latest` finished checkpoints, and what a kill left behind."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)
    paths = list(checkpoint_steps(folder).values())
    for path in paths[:-keep_latest] if keep_latest else []:
        shutil.rmtree(path)


def newest_intact(folder: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies, or None where there is none at all.

    Newer ones, all damaged, are set aside as step-*.damaged, so that they are neither kept in
    place of good ones nor looked at again.

    Raises:
        ValueError: If there are checkpoints and every one is damaged.
    """
    paths = list(checkpoint_steps(folder).values())
    damaged = []
    for path in reversed(paths):
        try:
            manifest = verify(path)
        except ValueError as error:
            logger.warning("%s", error)
            damaged.append(path)
        else:
            for bad in damaged:
                aside = bad.with_name(bad.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
            return path, manifest
    if paths:
        raise ValueError(
            f"checkpoint: none of the {len(paths)} in {folder} is intact, "
            "remove the folder to start from step 0"
        )
    return None


def resume(
    folder: Path,
    model: Llama,
    optimizer: OptimizersContainer,
    *,
    identity: RunIdentity,
    runtime: Runtime,
) -> int:
    """Load the newest intact checkpoint of this run into model and optimizer, in place.

    Returns:
        t, the number of steps done: 0 where there is no checkpoint yet.

    Raises:
        ValueError: If the checkpoint is of another model, tokenizer or dataset.
    """

    def choose() -> tuple[int, Path] | None:
        found = newest_intact(folder) if runtime.is_main else None
        if found is None:
            return None
        path, manifest = found
        _check_identity(path, manifest, identity)
        for change in differences(manifest.config, identity.config):
            logger.warning("config: %s from step %d on", change, manifest.step)
        return manifest.step, path

    chosen = runtime.gather(runtime.on_every_rank(choose))[0]
    if chosen is None:
        return 0
    t, path = chosen
    # DCP writes into these tensors, which are the model's and the optimizer's own.
    load(_tensors(model, optimizer), storage_reader=TensorReader(path))
    logger.info("checkpoint: resuming from %s, step %d", path, t)
    return t


def load_initial_weights(source: str, model: Llama, *, runtime: Runtime) -> None:
    """Start from another run's weights: the tensors of the model alone.

    Raises:
        ValueError: If there is no intact checkpoint, or its model has another shape.
    """

    def choose() -> Path:
        path = find_checkpoint(Path(source))
        if runtime.is_main:
            found = verify(path).model
            if found != model.config:
                raise ValueError(
                    f"checkpoint.init_from: {path} holds {found}, not the model asked for, "
                    "choose the matching size"
                )
        return path

    path = runtime.on_every_rank(choose)
    state = model.state_dict()
    reader = TensorReader(path)
    check_tensors(reader, "model.", state)
    load({"model": state}, storage_reader=reader)  # in place
    logger.info("checkpoint: starting from the weights of %s", path)


def _refuse_non_finite(model: Llama, t: int, runtime: Runtime) -> None:
    """Raise on every rank if any rank's part of the weights is not finite."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if not (value.to_local() if isinstance(value, DTensor) else value).isfinite().all()
    ]
    if found := sorted(name for names in runtime.gather(bad) for name in names):
        raise FloatingPointError(
            f"{found[0]} is not finite after step {t}, so no checkpoint was written, lower optim.lr"
            " and start again from the last one"
        )


def _tensors(model: Llama, optimizer: OptimizersContainer) -> dict[str, dict[str, Tensor]]:
    """Return all state that is saved: tensors only, so that nothing is ever unpickled."""
    moments = {k: v for k, v in optimizer.state_dict().items() if isinstance(v, Tensor)}
    return {"model": model.state_dict(), "optimizer": moments}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Say field by field what two resolved configurations differ in."""
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} was {before}, is {after}"


def _check_identity(path: Path, manifest: Manifest, identity: RunIdentity) -> None:
    if manifest.model != identity.model:
        differing = [
            f"model.{name} {getattr(manifest.model, name)} (asked for: {value})"
            for name, value in vars(identity.model).items()
            if getattr(manifest.model, name) != value
        ]
        raise ValueError(
            f"name: {path} is of another model, with {', '.join(differing)}; "
            "choose another --name or the configuration it was made with"
        )
    for kind in ("tokenizer_fingerprint", "data_fingerprint"):
        if getattr(manifest, kind) != getattr(identity, kind):
            raise ValueError(
                f"name: {path} was trained on other data ({kind} {getattr(manifest, kind)[:12]}, "
                f"now {getattr(identity, kind)[:12]}), choose another --name or give that data back"
            )
