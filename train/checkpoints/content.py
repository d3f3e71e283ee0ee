"""The content of a checkpoint: its tensors, and the identity of the run they belong to."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint_format import Manifest
from models.config import LlamaConfig
from models.host_copy import HostCopy
from models.llama import Llama
from train.optimizer.optim import OptimConfig, Optimizers, num_moments
from train.parallel.local_part import local_part
from train.parallel.runtime import Runtime

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class RunIdentity:
    """The identity of a run, which its checkpoints carry: model, configuration, tokenizer, data."""

    model: LlamaConfig
    config: dict[str, Any]
    tokenizer_path: Path
    tokenizer_fingerprint: str
    data_fingerprint: str

    def manifest(self, t: int, state: dict[str, Any], runtime: Runtime) -> Manifest:
        """Return the manifest of step t, without files."""
        versions = {name: version(name) for name in ("torch", "torchtitan", "sentencepiece")}
        return Manifest(
            step=t,
            model=self.model,
            config=self.config,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            data_fingerprint=self.data_fingerprint,
            world_size=runtime.world_size,
            versions={"python": platform.python_version()} | versions,
            files={},
            state=state,
        )


def training_tensors(model: Llama, optimizer: Optimizers) -> Tensors:
    """Return all state that is saved: tensors alone, so that loading unpickles nothing."""
    moments = {k: v for k, v in optimizer.state_dict().items() if isinstance(v, Tensor)}
    tensors = {"model": model.state_dict(), "optimizer": moments}
    average = optimizer.average
    return tensors if average is None else tensors | {"ema": average.tensors}


def tensor_bytes(model: Llama, optim: OptimConfig) -> int:
    """Return the bytes of fp32 weights and their moments, over all ranks.

    The model may be on the meta device, or sharded. Frozen weights have no moments.
    """
    return sum(
        4 * p.numel() * (1 + bool(optim.ema_decay) + num_moments(name, optim) * p.requires_grad)
        for name, p in model.named_parameters()
    )


def checkpoint_bytes(model: Llama, optim: OptimConfig) -> int:
    """Return the bytes that a checkpoint takes on disk at most: `tensor_bytes` and some slack."""
    tensors = tensor_bytes(model, optim)
    return tensors + tensors // 100 + 2**13 * len(list(model.parameters())) + 2**20


def refuse_non_finite(model: Llama, t: int, gather: Callable[[list[str]], list[list[str]]]) -> None:
    """Raise a FloatingPointError on every rank if any rank's part of the weights is not finite.

    Args:
        model: The model, which may be sharded.
        t: Optimizer steps done.
        gather: Returns every rank's value, by rank.
    """
    parts = {name: local_part(value) for name, value in model.state_dict().items()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    # One pass, without a copy: both bounds are NaN if any element is.
    bounds = [torch.stack(part.aminmax()) for part in parts.values()]
    finite = HostCopy(torch.stack(bounds).isfinite().all(1)).read() if bounds else []
    bad = [name for name, good in zip(parts, finite, strict=True) if not good]
    if found := sorted(name for names in gather(bad) for name in names):
        raise FloatingPointError(
            f"{found[0]} is not finite after step {t}, so no checkpoint was written, lower "
            "optim.lr and resume from the last one"
        )
