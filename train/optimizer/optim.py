"""AdamW, or Muon beside it, and the learning rate as a pure function of t."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.llama import Llama
from train.optimizer.muon import Muon
from train.optimizer.weight_average import WeightAverage
from train.parallel.parallelize import Trains
from train.parallel.titan import OptimizersContainer, ParamGroupConfig

# A parameter belongs to the first that matches its name.
_NORMS = r"(norm\.weight|bias)$"
_MATRICES = r"^(layers|own_exits)\..*\.w[qkvo123]\.weight$"
_REST = r".*"  # embeddings, head, routers


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: for all weights. muon: for the blocks' matrices, and AdamW for the rest, to which
    adam_monitor is then limited. Muon's updates are scaled to the size of AdamW's, so that lr and
    weight_decay apply to both (arXiv 2502.16982)."""
    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's decay rate of its one moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the blocks' matrices."""
    embedding_weight_decay: float | None = None
    """Weight decay of token embeddings and head, tied or not, and of routers' matrices. None:
    weight_decay."""
    norm_weight_decay: float = 0.0
    """Weight decay of norm weights and biases."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    warmup_steps: int = 100
    """Steps of the linear warmup from 0 to the peak."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """After warmup: cosine or linear decay to the end, or warmup-stable-decay (flat, then linear
    decay over the last `decay_fraction` of all steps; arXiv 2404.06395)."""
    decay_fraction: float = 0.2
    """Share of all steps that wsd decays over, 0 to 1."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    ema_decay: float = 0.0
    """Average the weights with this decay, as 0.9999: validation measures the average too, and
    RUN/model and `models.convert --weights ema` export it. 4 more bytes per weight. 0: none."""
    trains: Trains = "all"
    """all: every weight learns. exits: only the own parts of the exits in model.own_exits, the rest
    is frozen as in checkpoint.init_from (EE-Tuning, arXiv 2402.00518): only those parts have
    gradients and moments, and only those exits are run and have a loss."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        checks = [
            ("lr", self.lr > 0, "must be positive"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "must lie in [0, 1)"),
            ("eps", self.eps > 0, "must be positive"),
            ("muon_momentum", 0 <= self.muon_momentum < 1, "must lie in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "must not be negative"),
            (
                "embedding_weight_decay",
                (self.embedding_weight_decay or 0) >= 0,
                "must not be negative",
            ),
            ("norm_weight_decay", self.norm_weight_decay >= 0, "must not be negative"),
            ("max_grad_norm", self.max_grad_norm > 0, "must be positive"),
            ("warmup_steps", self.warmup_steps >= 0, "must not be negative"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "must lie in [0, 1]"),
            ("ema_decay", 0 <= self.ema_decay < 1, "must lie in [0, 1)"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "must lie in [0, 1]"),
        ]
        return [
            f"optim.{name}: {getattr(self, name)}, {remedy}"
            for name, ok, remedy in checks
            if not ok
        ]

    def warnings(self, T: int) -> list[str]:
        """Return what is doubtful about the fields in a run of T steps, one line each."""
        if self.warmup_steps < T or not self.warmup_steps:
            return []
        return [
            f"optim.warmup_steps: {self.warmup_steps}, but the run has {T} steps: the learning "
            f"rate rises to its end, to {lr(self, T - 1, T):.3g} of {self.lr:g}, lower it"
        ]


def lr(config: OptimConfig, t: int, T: int) -> float:
    """Return the learning rate of step t of T.

    Warmup reaches the peak at step warmup_steps - 1; the last step, T - 1, is at
    min_lr_ratio * lr.
    """
    if t < config.warmup_steps:
        return config.lr * (t + 1) / config.warmup_steps
    begin = config.warmup_steps - 1
    if config.schedule == "wsd":
        begin = max(begin, T - 1 - round(config.decay_fraction * T))
    progress = min(max((t - begin) / max(T - 1 - begin, 1), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class Optimizers(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container, with this Muon added, and an average of the weights it updates."""

    average: WeightAverage | None = None
    """None: there is none."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == "Muon":
            return Muon
        factory: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return factory


def build_optimizer(model: Llama, config: OptimConfig) -> Optimizers:
    """Return fused AdamW over all that learns; or over all but the blocks' matrices, and Muon."""
    adamw = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    muon = {"lr": config.lr, "momentum": config.muon_momentum}
    rest_decay = config.embedding_weight_decay
    learn = {_pattern_of(n) for n, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        ParamGroupConfig(
            pattern=pattern,
            optimizer_name=name,
            optimizer_kwargs=(muon if name == "Muon" else adamw) | {"weight_decay": decay},
        )
        for pattern, name, decay in (
            (_NORMS, "AdamW", config.norm_weight_decay),
            (_MATRICES, "Muon" if config.name == "muon" else "AdamW", config.weight_decay),
            (_REST, "AdamW", config.weight_decay if rest_decay is None else rest_decay),
        )
        if pattern in learn
    ]
    optimizer = Optimizers(Optimizers.Config(param_groups=groups), model_parts=[model])
    if config.ema_decay:
        optimizer.average = WeightAverage(model, config.ema_decay)
    return optimizer


def num_moments(name: str, config: OptimConfig) -> int:
    """Return how many moments the optimizer keeps for each weight of the parameter."""
    return 1 if config.name == "muon" and _pattern_of(name) == _MATRICES else 2


def _pattern_of(name: str) -> str:
    return next(pattern for pattern in (_NORMS, _MATRICES, _REST) if re.search(pattern, name))


def set_lr(optimizer: OptimizersContainer, value: float) -> None:
    """Set the learning rate of the next step."""
    for inner in optimizer:
        for group in inner.param_groups:
            group["lr"] = value


def update_unless(bad: Tensor, optimizer: Optimizers, t: int) -> None:
    """Update the weights and their average unless `bad` holds; clear the gradients in any case.

    Args:
        bad: Scalar bool on the device; the host does not wait for it.
        optimizer: Fused AdamW, whose kernel reads `found_inf` as torch.amp.GradScaler sets it and
            then leaves weights, moments and its step count unchanged; and Muon, which does the
            same.
        t: The step.
    """
    for inner in optimizer:
        inner.found_inf = bad.to(inner.param_groups[0]["params"][0].device, torch.float32)
        inner.grad_scale = None
        inner.step()
        inner.zero_grad()
    if optimizer.average is not None:
        optimizer.average.update_unless(bad, t)
