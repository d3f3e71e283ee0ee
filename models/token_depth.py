"""Which layers each token runs: the rules that training and the decoding strategies share.

Unified Layer Skipping (arXiv 2404.06954), SkipDecode (arXiv 2307.02628) and the mixed training of
the Depth-Adaptive Transformer (arXiv 1910.10073). A token that does not run layer l keeps its
state, from which the layer still makes keys and values. In training every layer is computed for
every token and the result discarded where the token does not run it: no compute is saved, and every
rank calls every layer. Layers l count from 0; L layers; E = number of layers run.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.layer_dropout import hash_uniform

Kind = Literal["all", "unified", "skipdecode", "mixed"]


@dataclass(frozen=True, kw_only=True)
class TokenDepthConfig:
    """Layers that some tokens do not run in training, as in decoding."""

    kind: Kind = "all"
    """all: each token runs all layers. unified: response tokens run the layers that decoding with
    `unified` keeps. skipdecode: later tokens run fewer, as with `skipdecode`. mixed: each token
    leaves after E layers, drawn anew, and its state is copied up, as with `calm`; the last layer's
    loss is that of every token's own exit. No compute is saved. Tokens of a prompt, up to the one
    whose label is the first learnt, run all layers (skipdecode: max_layers). A row is one text,
    whose prompt it may begin with; with data.mask_documents each document is one."""
    speedup: float = 2.0
    """For unified: the model's layers over those of a response token, see `unified_layers`."""
    warmup: int = 1
    """For skipdecode: the first layers, that every token runs."""
    max_layers: int | None = None
    """For skipdecode: layers of the prompt and the first new token; None: all."""
    min_layers: int | None = None
    """For skipdecode: layers of the last tokens; None: half of the model's, rounded up."""
    length: int = 128
    """For skipdecode: new tokens over which the budget falls."""
    exits: tuple[int, ...] = ()
    """For mixed: the E that tokens leave after, all equally likely; empty: 1, ..., L."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the fields for such a model, one line each."""
        found = []
        if self.kind == "unified":
            found = speedup_problems(n_layers, self.speedup)
        elif self.kind == "skipdecode":
            found = self.budget(n_layers).problems(n_layers)
        elif self.kind == "mixed" and not all(1 <= E <= n_layers for E in self.exits):
            found = [f"exits: {self.exits}, mixed needs 1 to {n_layers} layers"]
        return [f"token_depth.{line}" for line in found]

    def budget(self, n_layers: int) -> "FallingBudget":
        """Return SkipDecode's budget for such a model."""
        return falling_budget(n_layers, self.warmup, self.max_layers, self.min_layers, self.length)


def evenly_spaced(n_layers: int, kept: int) -> tuple[int, ...]:
    """Return `kept` layers l spread evenly, the first and the last among them.

    round(i (L - 1) / (n - 1)) for i = 0, ..., n - 1.
    """
    return tuple(round(i * (n_layers - 1) / (kept - 1)) for i in range(kept))


def unified_layers(n_layers: int, speedup: float) -> tuple[int, ...]:
    """Return the layers l that a new token runs under Unified Layer Skipping (arXiv 2404.06954).

    A target speedup s keeps n = max(2, round(L / s)) layers. The published rule takes every
    floor(L / (n - 1))-th layer, which divides by zero for s > L / 2 and leaves its remainder as one
    hole at the end; `evenly_spaced` does neither.

    The prompt runs all layers, its last token too, so that the first new token is the full model's:
    the paper encodes the prompt at full depth, and in the authors' code (Unified_Layer_Skipping,
    modeling_bloom.py) its one pass, in training as in decoding, ends with the prompt's last token.
    """
    kept = min(n_layers, max(2, round(n_layers / speedup)))
    return evenly_spaced(n_layers, kept) if n_layers > 1 else (0,)


def speedup_problems(n_layers: int, speedup: float) -> list[str]:
    """Return what is wrong with a target speedup s of such a model.

    Between 1 and L / 2, the nearest that whole layers allow is reached; above, none would be near.
    """
    if not speedup >= 1.0:
        return [f"speedup: {speedup}, unified needs at least 1"]
    if n_layers > 2 and round(n_layers / speedup) < 2:
        return [
            f"speedup: {speedup}, unified keeps 2 of this model's {n_layers} layers at least, "
            f"give at most {n_layers / 2:g}"
        ]
    return []


@dataclass(frozen=True, kw_only=True)
class FallingBudget:
    """The layers SkipDecode (arXiv 2307.02628) gives each new token.

    The n-th new token, n from 0, has the budget
      e(n) = max - (max - min) min(n / length, 1), rounded, halves up,
    and runs layers 0, ..., W - 1 and the top e - W. A later token's layers are a subset of an
    earlier one's, so every key it attends to exists.
    """

    warmup: int
    """W."""
    most: int
    """max, also of every token before the first new one."""
    least: int
    """min."""
    length: int
    """New tokens over which it falls; later ones stay at min."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the budget for such a model, one line each."""
        found = []
        if not 1 <= self.most <= n_layers:
            found.append(
                f"max_layers: {self.most}, skipdecode needs 1 to {n_layers} for this model"
            )
        if not 1 <= self.least <= self.most:
            found.append(f"min_layers: {self.least}, skipdecode needs 1 to max_layers {self.most}")
        if not 0 <= self.warmup <= self.least:
            found.append(f"warmup: {self.warmup}, skipdecode needs 0 to min_layers {self.least}")
        if self.length < 1:
            found.append(f"length: {self.length}, skipdecode needs at least 1 token")
        return found

    def at(self, new_tokens: Tensor) -> Tensor:
        """Return e(n) for n: int64 of any shape."""
        # One division, of whole numbers, so that halves are exact; to even, steps would be uneven.
        n = new_tokens.clamp(0, self.length)
        fall = ((self.most - self.least) * n).double() / self.length
        return (self.most - fall + 0.5).floor().long()

    def left_out(self, budget: int, n_layers: int) -> range:
        """Return the layers l that a token of this budget leaves out: those above the warmup."""
        return range(self.warmup, self.warmup + n_layers - budget)

    def runs(self, l: int, budgets: Tensor, n_layers: int) -> Tensor | None:
        """Return which tokens run layer l, bool, for their budgets; None: all."""
        return None if l < self.warmup else l >= self.warmup + n_layers - budgets


def falling_budget(
    n_layers: int, warmup: int, most: int | None, least: int | None, length: int
) -> FallingBudget:
    """Return a budget from all layers down to half of them, rounded up, where None is given."""
    most = n_layers if most is None else most
    least = min(most, (n_layers + 1) // 2) if least is None else least
    return FallingBudget(warmup=warmup, most=most, least=least, length=length)


@dataclass(frozen=True)
class TokenLayers:
    """Which tokens of one microbatch run each layer."""

    runs: tuple[Tensor | None, ...]
    """(batch, seq) bool for each layer l; None: all tokens."""

    def select(self, l: int, before: Tensor, after: Tensor) -> Tensor:
        """Return x_{l+1}: `after` of the tokens that run layer l, `before` of the others."""
        runs = self.runs[l]
        return after if runs is None else torch.where(runs.unsqueeze(-1), after, before)


def token_layers(
    config: TokenDepthConfig,
    n_layers: int,
    learnt: Tensor,
    documents: Tensor | None,
    exits: Tensor | None,
) -> TokenLayers | None:
    """Return the layers each token of a microbatch runs; None: all of them.

    Args:
        config: The rule.
        n_layers: L.
        learnt: (batch, seq) bool, whether the token after each is to be learnt.
        documents: (batch, seq) int64, the number of each token's document in its row, where
            attention stays within them; None: a row is one text.
        exits: (batch, seq) int64, E of each token, see `draw_exits`; None: kind mixed runs all.
    """
    layers = range(n_layers)
    if config.kind == "mixed" and exits is not None:
        return TokenLayers(tuple(exits > l for l in layers))
    if config.kind == "unified":
        prompt = new_tokens(learnt, documents) < 0
        kept = unified_layers(n_layers, config.speedup)
        return TokenLayers(tuple(None if l in kept else prompt for l in layers))
    if config.kind == "skipdecode":
        budget = config.budget(n_layers)
        budgets = budget.at(new_tokens(learnt, documents))
        return TokenLayers(tuple(budget.runs(l, budgets, n_layers) for l in layers))
    return None


def new_tokens(learnt: Tensor, documents: Tensor | None) -> Tensor:
    """Return n of each token, its position in its text less the length of the prompt: (batch, seq).

    The prompt ends with the first token whose next one is learnt, n = -1; new tokens count n from
    0. Plain text has a prompt of one token; a text without a loss is all prompt.

    Args:
        learnt: (batch, seq) bool, whether the token after each is to be learnt.
        documents: (batch, seq) int64, the number of each token's text in its row; None: one.
    """
    batch, seq = learnt.shape
    positions = torch.arange(seq, device=learnt.device).expand(batch, seq)
    first = learnt.new_full((batch, seq + 1), seq, dtype=torch.int64)
    number = torch.zeros_like(positions) if documents is None else documents
    # Documents are numbered from 0, or from 1 where the row begins with one: seq + 1 at most.
    first = first.scatter_reduce(1, number, positions.masked_fill(~learnt, seq), "amin")
    return positions - first.gather(1, number) - 1


def draw_exits(
    config: TokenDepthConfig,
    n_layers: int,
    *,
    seed: int,
    t: int,
    samples: NDArray[np.int64],
    seq_len: int,
) -> NDArray[np.int64]:
    """Draw E for each token: a hash of (seed, t, sample, position), (batch, seq) int64.

    Args:
        config: The E to draw from.
        n_layers: L.
        seed: Any non-negative integer.
        t: Optimizer step.
        samples: (batch,) int64, each row's index in the global batch.
        seq_len: Tokens of a row.
    """
    exits = np.array(config.exits or range(1, n_layers + 1), dtype=np.int64)
    draws = hash_uniform(seed, t, _EXITS, samples[:, None], np.arange(seq_len))
    return exits[(draws * len(exits)).astype(np.int64)]


_EXITS = 2**32
"""Hashed in place of layer dropout's layer index, so that the two draw independently."""
