"""Held-out loss at every exit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.shards import TokenStream
from loss.cross_entropy import IGNORE_INDEX
from loss.early_exit import early_exit_loss
from models.llama import Llama
from train.runtime import Runtime


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


@torch.no_grad()
def validate(
    model: Llama,
    stream: TokenStream,
    config: ValidateConfig,
    runtime: Runtime,
    *,
    seq_len: int,
    rows: int,
    chunk_rows: int,
) -> list[float]:
    """Return the held-out loss of the exit after each layer l = 0, ..., L - 1.

    The result does not depend on the number of ranks. A rank that has run out of sequences goes on
    with empty rows, because every rank must call every block.

    Args:
        model: The model being trained.
        stream: The held-out tokens.
        config: How many sequences.
        runtime: This rank.
        seq_len: Tokens per sequence.
        rows: Sequences per rank and forward pass.
        chunk_rows: As for training.

    Returns:
        L losses in nats per token.
    """
    L, device = model.config.n_layers, runtime.device
    weights = dict.fromkeys(range(L), 0.0)
    sums = torch.zeros(L + 1, device=device)
    starts = stream.spread(config.sequences, seq_len)
    begin = runtime.rank * rows
    for first in range(begin, begin + len(starts), rows * runtime.world_size):
        tokens, labels = _read(stream, starts[first : first + rows], rows, seq_len)
        hidden = model(tokens.to(device), exit_layers=range(L))
        loss = early_exit_loss(
            hidden,
            model.head_weight,
            labels.to(device),
            weights,
            num_tokens=1.0,
            chunk_rows=chunk_rows,
        )
        sums[:L] += torch.stack(list(loss.per_exit.values()))
        sums[L] += (labels != IGNORE_INDEX).sum()
    runtime.sum_over_ranks(sums)
    losses: list[float] = (sums[:L] / sums[L]).tolist()
    return losses


def _read(stream: TokenStream, starts: list[int], rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, (rows, seq_len) each; rows beyond `starts` count for nothing."""
    batch = torch.zeros(rows, seq_len + 1, dtype=torch.int64)
    labels = torch.full((rows, seq_len), IGNORE_INDEX)
    for row, start in enumerate(starts):
        batch[row] = torch.from_numpy(stream.read(start, seq_len + 1))
        labels[row] = batch[row, 1:]
    return batch[:, :-1], labels
