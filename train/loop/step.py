"""One optimizer step: minimise J(X, Y, t) over the microbatches of a global batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from data.loader import Microbatch
from data.shards import NO_LOSS
from loss.density import DensityConfig, density_penalty_sum, running_share_sum
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.host_copy import to_device
from models.layer_dropout import KeptRows, LayerDropoutConfig, draw_kept_rows
from models.llama import Llama
from models.token_depth import TokenDepthConfig, TokenLayers, draw_exits, token_layers
from train.loop.exit_tokens import draw_tokens
from train.loop.layerskip import StepPlan
from train.loop.step_metrics import StepResult, StepTotals
from train.monitoring.adam_monitor import AdamMonitor
from train.optimizer.optim import OptimConfig, Optimizers, lr, set_lr, update_unless
from train.parallel.parallelize import average_gradients, set_gradient_sync
from train.parallel.runtime import Runtime
from train.parallel.titan import clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of the run that a step depends on, besides its plan."""

    seed: int
    T: int
    """Total steps of the run."""
    optim: OptimConfig
    layer_dropout: LayerDropoutConfig
    early_exit: EarlyExitConfig
    token_depth: TokenDepthConfig = field(default_factory=TokenDepthConfig)
    capacity: float = 1.0
    """See RouterConfig."""
    density: DensityConfig = field(default_factory=DensityConfig)
    reduce_every_microbatch: bool = False
    """See ParallelConfig."""
    reshard_after_forward: bool = True
    """See ParallelConfig."""


def train_step(
    model: Llama,
    optimizer: Optimizers,
    microbatches: Sequence[Microbatch],
    plan: StepPlan,
    t: int,
    *,
    config: StepConfig,
    runtime: Runtime,
    adam_monitor: AdamMonitor | None = None,
    local_stop_requested: bool = False,
) -> StepResult:
    """Take the gradient of J, clip it and update the weights.

    Where a loss of any exit or the gradient is not finite on any rank, or no token of the global
    batch has a label, no rank updates anything: weights and moments stay as they were. The
    decision is made on the device.
    """
    local = accumulate_gradients(model, microbatches, plan, t, config=config, runtime=runtime)
    grad_norm = clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
    if adam_monitor is not None:
        adam_monitor.observe()
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    # Summed along with the rest, so that every rank decides by the same bits.
    local.grad_norm += grad_norm.to(runtime.device) / runtime.world_size
    local.num_stops += float(local_stop_requested)
    totals = StepTotals(runtime.sum_over_ranks(local.packed.clone()))
    set_lr(optimizer, lr(config.optim, t, config.T))
    useless = ~totals.packed.isfinite().all() | (totals.exit_tokens.sum() == 0)
    with record_function("optimizer"):
        update_unless(useless, optimizer, t)
    return StepResult(totals, local)


def accumulate_gradients(
    model: Llama,
    microbatches: Sequence[Microbatch],
    plan: StepPlan,
    t: int,
    *,
    config: StepConfig,
    runtime: Runtime,
) -> StepTotals:
    """Run forward and backward of J over this rank's microbatches.

    The loss is divided by the number of tokens with a label in the global batch, the density
    penalty by the number of rows, so the gradient is the same however the batch is split over
    ranks and microbatches.

    Returns:
        This rank's part of the totals; gradient norm and stops are still 0.
    """
    L, device = model.config.n_layers, runtime.device
    num_labels = [microbatch.num_labels for microbatch in microbatches]
    # Of the global batch; the host does not wait for the sum.
    num_tokens = torch.full((), float(sum(num_labels)), device=device)
    runtime.sum_over_ranks(num_tokens).clamp_(min=1.0)  # 0: all losses are 0, not 0 / 0
    num_rows = runtime.world_size * sum(len(microbatch.tokens) for microbatch in microbatches)
    totals, exit_tokens = StepTotals.zeros(L, device), torch.zeros(L)
    for m, microbatch in enumerate(microbatches):
        set_gradient_sync(
            model,
            plan.hidden_layers,
            m == len(microbatches) - 1,
            every_microbatch=config.reduce_every_microbatch,
            reshard_after_forward=config.reshard_after_forward,
        )
        batch = microbatch.to(device)
        with record_function("forward"):
            hidden = model(
                batch.tokens,
                exit_layers=plan.hidden_layers,
                kept_rows=_kept_rows(plan, config, runtime, microbatch, t, m),
                documents=batch.documents,
                token_layers=_token_layers(config, model.config.n_layers, batch, t),
                capacity=config.capacity,
            )
        with record_function("loss"):
            loss = early_exit_loss(
                hidden.exits,
                model.head_weight,
                batch.labels,
                plan.exit_weights,
                config=config.early_exit,
                tokens=_exit_tokens(plan, config, runtime, microbatch, t),
                state_pairs=plan.state_pairs,
            )
        # Gradients are averaged over ranks; J is a sum over them.
        objective = loss.total * (runtime.world_size / num_tokens)
        totals.J += loss.total.detach() / num_tokens
        if hidden.gates:
            penalty = density_penalty_sum(hidden.gates, config.density) / num_rows
            objective = objective + penalty * runtime.world_size
            totals.J += penalty.detach()
            totals.density += running_share_sum(hidden.gates) / num_rows
        with record_function("backward"):
            objective.backward()
        for l, exit_sum in loss.per_exit.items():
            totals.exit_sums[l] += exit_sum
            exit_tokens[l] += num_labels[m]
    with record_function("average gradients"):
        average_gradients(model, runtime)
    totals.exit_tokens.copy_(to_device(exit_tokens, device))
    return totals


def _kept_rows(
    plan: StepPlan,
    config: StepConfig,
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


def _token_layers(
    config: StepConfig, n_layers: int, batch: Microbatch, t: int
) -> TokenLayers | None:
    """Return the layers that each token of this microbatch runs."""
    depth, exits = config.token_depth, None
    if depth.kind == "mixed":
        drawn = draw_exits(
            depth, n_layers, seed=config.seed, t=t,
            samples=batch.samples.numpy(), seq_len=batch.tokens.shape[1],
        )  # fmt: skip
        exits = to_device(torch.from_numpy(drawn), batch.tokens.device)
    return token_layers(depth, n_layers, batch.labels != NO_LOSS, batch.documents, exits)


def _exit_tokens(
    plan: StepPlan, config: StepConfig, runtime: Runtime, microbatch: Microbatch, t: int
) -> Tensor | None:
    """Draw the tokens of this microbatch that the exits before the last learn from; None: all."""
    if plan.token_fraction == 1.0:
        return None
    tokens = draw_tokens(
        plan.token_fraction,
        seed=config.seed,
        t=t,
        samples=microbatch.samples.numpy(),
        seq=microbatch.labels.shape[1],
    )
    return to_device(torch.from_numpy(tokens), runtime.device)


def dropout_keys(
    config: LayerDropoutConfig, samples: NDArray[np.int64], m: int
) -> NDArray[np.int64]:
    """Return the key of each row's draw in microbatch m, beside seed, t and layer.

    Args:
        config: The granularity of layer dropout.
        samples: (batch,) int64 index of each row in the global batch.
        m: Index of the microbatch on this rank, from 0.

    Returns:
        (batch,) int64.
    """
    if config.granularity == "per_batch":
        return np.full_like(samples, m)
    if config.same_rows_on_every_rank:
        return np.arange(len(samples)) + m * len(samples)
    return samples
