"""One optimizer step: minimise J(X, Y, t) over the microbatches of a global batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Microbatch
from loss.early_exit import early_exit_loss
from models.layer_dropout import KeptRows, LayerDropoutConfig, draw_kept_rows
from models.llama import Llama
from train.config import TrainConfig
from train.layerskip import StepPlan
from train.optim import lr, set_lr
from train.parallelize import set_gradient_sync
from train.runtime import Runtime
from train.titan import OptimizersContainer, clip_grad_norm_


class StepResult(NamedTuple):
    """What one step did on this rank."""

    J: Tensor
    """This rank's part of J(X, Y, t), scalar fp32; the parts add up to J."""
    exit_loss_sums: Tensor
    """(L,) fp32: summed token loss of each exit that was on, 0 elsewhere."""
    exit_tokens: Tensor
    """(L,) fp32: number of tokens behind each sum."""
    grad_norm: Tensor
    """Norm of the whole gradient before clipping, scalar."""


def train_step(
    model: Llama,
    optimizer: OptimizersContainer,
    microbatches: Sequence[Microbatch],
    plan: StepPlan,
    t: int,
    *,
    config: TrainConfig,
    runtime: Runtime,
) -> StepResult:
    """Take the gradient of J, clip it and update the weights."""
    J, sums, counts = accumulate_gradients(
        model, microbatches, plan, t, config=config, runtime=runtime
    )
    grad_norm = clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
    set_lr(optimizer, lr(config.optim, t, config.steps))
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(J, sums, counts, grad_norm)


def accumulate_gradients(
    model: Llama,
    microbatches: Sequence[Microbatch],
    plan: StepPlan,
    t: int,
    *,
    config: TrainConfig,
    runtime: Runtime,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run forward and backward of J over this rank's microbatches.

    J is summed and divided once by the token count of the whole global batch, so the gradient is
    the same however the batch is split over ranks and microbatches.

    Returns:
        This rank's part of J, exit_loss_sums and exit_tokens, as in StepResult.
    """
    L, device = config.model.n_layers, runtime.device
    J = torch.zeros((), device=device)
    sums, counts = torch.zeros(L, device=device), torch.zeros(L)
    for m, microbatch in enumerate(microbatches):
        set_gradient_sync(model, m == len(microbatches) - 1)
        kept_rows = _kept_rows(plan, config, runtime, microbatch, t, m)
        tokens = microbatch.tokens.to(device, non_blocking=True)
        labels = microbatch.labels.to(device, non_blocking=True)
        hidden = model(tokens, exit_layers=plan.exit_layers, kept_rows=kept_rows)
        loss = early_exit_loss(
            hidden,
            model.head_weight,
            labels,
            plan.exit_weights,
            num_tokens=config.data.tokens_per_step,
            chunk_rows=config.early_exit.chunk_rows,
        )
        # FSDP averages gradients over ranks; J is a sum over them.
        (loss.total * runtime.world_size).backward()
        J += loss.total.detach()
        for l, exit_sum in loss.per_exit.items():
            sums[l] += exit_sum
            counts[l] += labels.numel()
    return J, sums, counts.to(device, non_blocking=True)


def _kept_rows(
    plan: StepPlan,
    config: TrainConfig,
    runtime: Runtime,
    microbatch: Microbatch,
    t: int,
    m: int,
) -> KeptRows | None:
    """Draw this microbatch's stochastic depth."""
    return draw_kept_rows(
        plan.drop_prob,
        seed=config.seed,
        t=t,
        keys=dropout_keys(config.layer_dropout, microbatch.samples.numpy(), m),
        scale_kept=config.layer_dropout.scale_kept,
        device=runtime.device,
    )


def dropout_keys(
    config: LayerDropoutConfig, samples: NDArray[np.int64], m: int
) -> NDArray[np.int64]:
    """Return what the draw of each row of microbatch m hangs on, besides seed, t and layer.

    Args:
        config: Says what is dropped together.
        samples: (batch,) each row's place in the global batch.
        m: Number of the microbatch on this rank, from 0.
    """
    if config.granularity == "per_batch":
        return np.full_like(samples, m)
    if config.same_rows_on_every_rank:
        return np.arange(len(samples)) + m * len(samples)
    return samples
