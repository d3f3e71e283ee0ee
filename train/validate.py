"""Held-out loss at every exit."""

from dataclasses import dataclass

import torch

from data.loader import TokenLoader
from loss.early_exit import early_exit_loss
from models.llama import Llama
from train.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """How often held-out loss is measured, and on how much."""

    interval_steps: int = 500
    """Steps between validations; the last step always validates. 0: only the last."""
    sequences: int = 64
    """Held-out sequences, rounded down to whole microbatches on all ranks, at least one."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        return [
            f"validate.{name}: {getattr(self, name)}, must be at least {least}"
            for name, least in (("interval_steps", 0), ("sequences", 1))
            if getattr(self, name) < least
        ]


@torch.no_grad()
def validate(
    model: Llama, loader: TokenLoader, config: ValidateConfig, runtime: Runtime, *, chunk_rows: int
) -> list[float]:
    """Return the held-out loss in nats per token of the exit after each layer l = 0, ..., L - 1."""
    L = model.config.n_layers
    weights = dict.fromkeys(range(L), 0.0)
    sums = torch.zeros(L + 1, device=runtime.device)
    batches = max(min(config.sequences, loader.windows) // loader.global_batch_size, 1)
    for _, microbatches in loader.batches(0, batches):
        for microbatch in microbatches:
            labels = microbatch.labels.to(runtime.device)
            hidden = model(microbatch.tokens.to(runtime.device), exit_layers=range(L))
            loss = early_exit_loss(
                hidden, model.head_weight, labels, weights, num_tokens=1.0, chunk_rows=chunk_rows
            )
            sums[:L] += torch.stack(list(loss.per_exit.values()))
            sums[L] += labels.numel()
    runtime.sum_over_ranks(sums)
    losses: list[float] = (sums[:L] / sums[L]).tolist()
    return losses
