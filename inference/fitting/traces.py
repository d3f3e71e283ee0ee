"""Traces: states, confidence and agreement of every exit along a text, recorded for any rule.

The text is read with all layers behind every key: a rule evaluated on a trace is evaluated without
the errors that its own exits would leave in the KV cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.shards import TokenStream
from data.windows import StreamWindows, spread
from inference.cli.terminal import with_progress
from inference.strategies.confidence import softmax_gap
from models.llama import Llama

_BATCH = 8
_LOGITS_ROWS = 1024


@dataclass(frozen=True)
class Trace:
    """Some exits, and the last layer, at every token of a text."""

    exits: range
    """The E recorded, less than n_layers."""
    states: Tensor
    """(exits, tokens, dim), x_E, on the CPU, in the model's dtype."""
    gap: Tensor
    """(exits, tokens) fp32, see `softmax_gap`."""
    agrees: Tensor
    """(exits, tokens) bool, whether the exit predicts the last layer's token."""


def read_windows(stream: TokenStream, tokens: int, seq_len: int) -> Tensor:
    """Return windows spread evenly over a stream, (windows, seq) int64.

    Args:
        stream: The text.
        tokens: Of all windows together, rounded down to whole windows, at least one.
        seq_len: Tokens of a window; fewer if the stream is shorter.

    Raises:
        ValueError: The stream has fewer than two tokens, or tokens is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens: {tokens}, give at least 1")
    if len(stream) < 2:
        raise ValueError(f"data: {len(stream)} tokens, prepare a larger dataset")
    seq = min(seq_len, len(stream) - 1)
    windows = StreamWindows(stream, seq)
    numbers = spread(windows, max(1, tokens // seq))
    return torch.from_numpy(np.stack([windows.read(i)[0] for i in numbers]))


@torch.inference_mode()
def run_windows(
    model: Llama, windows: Tensor, exits: Sequence[int], label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run all layers on a few windows at a time.

    Args:
        model: In eval mode.
        windows: (windows, seq) int64.
        exits: The E wanted, less than n_layers.
        label: Label of the progress bar.

    Yields:
        (exits, tokens, dim), x_E, and (tokens, dim), x_L, of the next windows.
    """
    L = model.config.n_layers
    for batch in with_progress(windows.split(_BATCH), label):
        h = model.embed(batch.to(model.norm.weight.device))
        x_L, states = model.run_layers(h, 0, L, exit_layers=[E - 1 for E in exits])
        yield torch.stack([states[E - 1].flatten(0, 1) for E in exits]), x_L.flatten(0, 1)


@torch.inference_mode()
def record(model: Llama, windows: Tensor, exits: range, label: str) -> Trace:
    """Record a trace of these exits.

    Args:
        model: In eval mode.
        windows: (windows, seq) int64.
        exits: The E wanted, ascending, less than n_layers.
        label: Label of the progress bar.
    """
    states, gaps, agreements = [], [], []
    for x, x_L in run_windows(model, windows, exits, label):
        _, last = read_exit(model, x_L, model.config.n_layers)
        read = [read_exit(model, h, E) for E, h in zip(exits, x, strict=True)]
        states.append(x.cpu())
        gaps.append(torch.stack([gap for gap, _ in read]).cpu())
        agreements.append(torch.stack([predicted == last for _, predicted in read]).cpu())
    return Trace(exits, torch.cat(states, 1), torch.cat(gaps, 1), torch.cat(agreements, 1))


def read_exit(model: Llama, h: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Return `softmax_gap` and the most probable token, each (tokens,), for x_E: (tokens, dim)."""
    gaps, predicted = [], []
    for rows in h.split(_LOGITS_ROWS):
        logits = model.exit_logits(rows, E)
        gaps.append(softmax_gap(logits))
        predicted.append(logits.argmax(-1))
    return torch.cat(gaps), torch.cat(predicted)
