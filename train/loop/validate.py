"""Held-out loss at every exit."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.boundaries import Boundaries
from data.loader import Microbatch, microbatch
from data.shards import NO_LOSS
from data.windows import Windows, spread
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.host_copy import HostCopy
from models.llama import Llama
from models.token_depth import TokenDepthConfig, token_layers
from train.parallel.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """How often held-out loss is measured, and on how much."""

    interval_steps: int = 500
    """Steps between validations; the last step always validates. 0: only the last."""
    sequences: int = 64
    """Held-out sequences, spread evenly over the split; fewer if it is shorter."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        return [
            f"validate.{name}: {getattr(self, name)}, must be at least {least}"
            for name, least in (("interval_steps", 0), ("sequences", 1))
            if getattr(self, name) < least
        ]


@dataclass(frozen=True)
class HeldOut:
    """The held-out sequences, and how the model reads them."""

    windows: Windows
    seq_len: int
    """Tokens per sequence."""
    boundaries: Boundaries | None = None
    """Of the documents that attention stays within; None: it does not."""


@torch.no_grad()
def validate(
    model: Llama,
    held_out: HeldOut,
    config: ValidateConfig,
    runtime: Runtime,
    *,
    rows: int,
    chunk_rows: int,
    token_depth: TokenDepthConfig,
) -> list[float]:
    """Return the held-out loss of the exit after each layer l = 0, ..., L - 1.

    The result does not depend on the number of ranks. A rank that has run out of sequences
    continues with empty rows, because every rank must call every block.

    Args:
        model: The model being trained.
        held_out: The held-out sequences.
        config: How many sequences.
        runtime: This rank.
        rows: Sequences per rank and forward pass.
        chunk_rows: As for training.
        token_depth: The layers that each token runs, as in training; of kind mixed, all.

    Returns:
        L losses in nats per token with a label; none if no token has one.
    """
    L, device = model.config.n_layers, runtime.device
    sums = torch.zeros(L + 1, device=device)
    numbers = spread(held_out.windows, config.sequences)
    begin = runtime.rank * rows
    for first in range(begin, begin + len(numbers), rows * runtime.world_size):
        batch = _read(held_out, numbers[first : first + rows], rows).to(device)
        sums += _exit_sums(model, batch, chunk_rows, token_depth)
    sums = torch.tensor(HostCopy(runtime.sum_over_ranks(sums)).read())
    if not sums[L]:
        return []
    losses: list[float] = (sums[:L] / sums[L]).tolist()
    return losses


def _exit_sums(
    model: Llama, batch: Microbatch, chunk_rows: int, token_depth: TokenDepthConfig
) -> Tensor:
    """Return the summed token loss of each exit and the number of tokens, (L + 1,) fp32."""
    L, labelled = model.config.n_layers, batch.labels != NO_LOSS
    hidden = model(
        batch.tokens,
        exit_layers=range(L),
        documents=batch.documents,
        token_layers=token_layers(token_depth, L, labelled, batch.documents, exits=None),
    )
    loss = early_exit_loss(
        hidden.exits,
        model.head_weight,
        batch.labels,
        dict.fromkeys(range(L), 0.0),
        config=EarlyExitConfig(chunk_rows=chunk_rows),
    )
    return torch.stack([*loss.per_exit.values(), labelled.sum()])


def _read(held_out: HeldOut, numbers: list[int], rows: int) -> Microbatch:
    """Return `rows` sequences; those beyond `numbers` have no labels."""
    tokens = np.zeros((rows, held_out.seq_len), dtype=np.int64)
    labels = np.full_like(tokens, NO_LOSS)
    for row, i in enumerate(numbers):
        tokens[row], labels[row] = held_out.windows.read(i)
    return microbatch(tokens, labels, np.arange(rows), held_out.boundaries)
