"""Stochastic depth: how often each layer is dropped, for which samples, and how that is run.

LayerSkip (arXiv 2404.16710), section 4.1.1. Everything here is a pure function of the seed, the
step and the sample, so that resume, replay under activation checkpointing and agreement between
ranks need no stored state. Layers l count from 0 and steps t from 0; L layers, T steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attention_mask import AttentionMask
from models.host_copy import to_device
from models.kept_rows import on_no_row, on_rows

DepthSchedule = Literal["exponential", "linear", "linear_from_first", "uniform"]
TimeSchedule = Literal[
    "constant", "exponential", "linear_increasing", "linear_decreasing", "progressive"
]


@dataclass(frozen=True, kw_only=True)
class LayerDropoutConfig:
    """Stochastic depth: p(l, t) = S(t) D(l) p_max. The defaults' form is the LayerSkip paper's."""

    p_max: float = 0.0
    """Drop probability of the last layer at full strength, 0 to 1; 0 turns layer dropout off."""
    D: DepthSchedule = "exponential"
    """Shape over depth: exponential (the paper's 2^(l/(L-1)) - 1), linear l/(L-1),
    linear_from_first (l+1)/L (progressive layer dropping), uniform 1 (LayerDrop)."""
    S: TimeSchedule = "exponential"
    """Shape over time: constant 1 (the paper's for continual training and finetuning), exponential
    2^(t/(T-1)) - 1 (the paper's from scratch), linear_increasing, linear_decreasing, progressive
    1 - exp(-100 t/T) (progressive layer dropping, p_max its 1 - theta_bar, 0.5)."""
    granularity: Literal["per_sample", "per_batch"] = "per_sample"
    """Draw for each sequence (the paper), or once for all sequences of a microbatch."""
    scale_kept: bool = False
    """Multiply the residual branch of kept samples by 1 / (1 - p). The paper does not."""
    same_rows_on_every_rank: bool = False
    """Drop the same local rows on every rank, as the paper does, so that no rank waits for one
    that kept more. False draws by the sample's row in the global batch: independent of the number
    of ranks."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        if not 0.0 <= self.p_max <= 1.0:
            return [f"layer_dropout.p_max: {self.p_max}, must lie in [0, 1]"]
        return []


def D(l: int, L: int, schedule: DepthSchedule = "exponential") -> float:
    """Return the depth factor of layer l of L.

    LayerSkip (arXiv 2404.16710), eq. 2: D(l) = exp(l ln2 / (L - 1)) - 1, which is 0 at the
    first layer and 1 at the last. Progressive layer dropping (arXiv 2010.13369): (l + 1) / L,
    as its layers count from 1. LayerDrop (arXiv 1909.11556): 1. A model of one layer has D(0) =
    0, its only layer is kept; but 1 with "uniform" and "linear_from_first".
    """
    if schedule == "uniform":
        return 1.0
    if schedule == "linear_from_first":
        return (l + 1) / L
    depth = l / (L - 1) if L > 1 else 0.0
    return 2.0**depth - 1.0 if schedule == "exponential" else depth


def S(t: int, T: int, schedule: TimeSchedule = "exponential") -> float:
    """Return the time factor of step t of T.

    LayerSkip (arXiv 2404.16710), eq. 3 and 4: S(t) = 1, or S_exp(t) = exp(t ln2 / (T - 1)) - 1.
    The linear forms, up t / (T - 1) and down 1 - t / (T - 1), are of later work. Progressive layer
    dropping (arXiv 2010.13369) keeps with theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar, so
    that 1 - theta(t) = (1 - theta_bar) (1 - exp(-gamma t)), with gamma = 100 / T.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "progressive":
        return 1.0 - math.exp(-100.0 * t / T)
    time = t / (T - 1) if T > 1 else 0.0
    if schedule == "exponential":
        return 2.0**time - 1.0
    return time if schedule == "linear_increasing" else 1.0 - time


def p(l: int, t: int, *, L: int, T: int, config: LayerDropoutConfig) -> float:
    """Return the drop probability p(l, t) = S(t) D(l) p_max (LayerSkip, eq. 1)."""
    return S(t, T, config.S) * D(l, L, config.D) * config.p_max


def uniform(seed: int, t: int, L: int, samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (L, n) numbers in [0, 1): a hash of (seed, t, layer, sample), not a stream.

    Args:
        seed: Any non-negative integer.
        t: Optimizer step.
        L: Number of layers; row l belongs to layer l.
        samples: (n,) int64 keys, one for each row of the microbatch.
    """
    return hash_uniform(seed, t, np.arange(L)[:, None], samples)


def hash_uniform(seed: int, *words: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Return numbers in [0, 1): a hash of the seed and of words, broadcast against each other.

    The words are folded in one after another by splitmix64's finaliser.
    """
    state = np.array([seed % 2**64], dtype=np.uint64)
    for word in words:
        state = _splitmix64(state ^ _splitmix64(np.atleast_1d(word).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words (Steele et al., OOPSLA 2014), modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class LayerChoice:
    """Which rows of one microbatch one layer runs on, and their scale."""

    rows: Tensor | None
    """(kept,) int64 row indices to run; None runs all rows."""
    scale: float
    """Factor on the residual branch of the rows that run."""


@dataclass(frozen=True)
class KeptRows:
    """Which rows of one microbatch each layer runs on."""

    choices: tuple[LayerChoice, ...]

    def at(self, l: int) -> LayerChoice:
        return self.choices[l]


def choice_at(l: int, kept_rows: KeptRows | None) -> LayerChoice:
    """Return layer l's choice; None keeps all rows."""
    return LayerChoice(None, 1.0) if kept_rows is None else kept_rows.at(l)


def draw_kept_rows(
    drop_prob: Sequence[float],
    *,
    seed: int,
    t: int,
    keys: NDArray[np.int64],
    scale_kept: bool,
    device: torch.device,
) -> KeptRows | None:
    """Draw which rows each layer keeps: row b of layer l is dropped with probability p(l, t).

    Args:
        drop_prob: (L,) probabilities p(l, t).
        seed: Any non-negative integer.
        t: Optimizer step.
        keys: (batch,) int64; rows with equal keys are dropped together.
        scale_kept: Whether kept branches are multiplied by 1 / (1 - p).
        device: Of the row indices; they are drawn on the host and copied once.

    Returns:
        The choice of every layer, or None when every p(l, t) is 0.
    """
    if not any(drop_prob):
        return None
    kept = uniform(seed, t, len(drop_prob), keys) >= np.asarray(drop_prob)[:, None]
    _, row_indices = np.nonzero(kept)
    indices = to_device(torch.from_numpy(row_indices), device)
    choices, begin = [], 0
    for p_l, kept_l in zip(drop_prob, kept, strict=True):
        count = int(kept_l.sum())
        rows = None if count == len(keys) else indices[begin : begin + count]
        scale = 1.0 / (1.0 - p_l) if scale_kept and p_l < 1.0 else 1.0
        choices.append(LayerChoice(rows, scale))
        begin += count
    return KeptRows(tuple(choices))


def run_kept_rows(
    block: Callable[..., Tensor],
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    choice: LayerChoice,
    documents: AttentionMask | None = None,
) -> Tensor:
    """Run a block on the kept rows of h: (batch, seq, dim); dropped rows pass unchanged.

    x_{l+1} = x_l + M f_l(x_l) (LayerSkip, eq. 1), with no compute for rows whose M is 0. The block
    is called even when no row is kept, on one token whose result is discarded: under FSDP the call
    carries the all-gather and the reduce-scatter that every rank must reach.
    """
    if choice.rows is None:
        arguments = (None,) if documents is None else documents.arguments(None)
        return _scaled(h, block(h, cos, sin, *arguments), choice.scale)
    if choice.rows.numel() == 0:
        return on_no_row(lambda token: block(token, cos[..., :1, :], sin[..., :1, :]), h)
    arguments = (None,) if documents is None else documents.arguments(choice.rows)
    return on_rows(
        lambda kept: _scaled(kept, block(kept, cos, sin, *arguments), choice.scale), h, choice.rows
    )


def _scaled(x: Tensor, out: Tensor, scale: float) -> Tensor:
    return out if scale == 1.0 else x + (out - x) * scale
