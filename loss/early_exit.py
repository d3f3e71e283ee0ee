"""The early-exit loss J of LayerSkip and the weight of each exit in it.

LayerSkip (arXiv 2404.16710), section 4.1.2, eq. 5 and 6. l = layer index from 0, the exit after
layer l; L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from loss.cross_entropy import ExitTokens, weighted_cross_entropy_sums
from loss.distillation import weighted_divergence_sum
from loss.state_distillation import StateMatching, StatePair, state_distance_sum

Weighting = Literal["layerskip", "linear", "uniform", "fixed"]


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig:
    """The loss of each exit, and its weight in J.

    "Exits before the last": all but the deepest of those that are on.
    """

    e_scale: float = 0.2
    """Weight of the exits before the last layer, 0 to 1, for weights layerskip. The paper: 0.1 to
    0.2 for pretraining, 1.0 for finetuning on a narrow domain or task."""
    weights: Weighting = "layerskip"
    """layerskip: e_tilde. linear: E / sum of E over the exits that are on (CALM, PABEE; with one
    exit FREE's shallow-deep loss). uniform: all the same (the aligned training of the
    Depth-Adaptive Transformer). fixed: the last layer 1, the others exit_weights (EE-LLM)."""
    exits: tuple[int, ...] = ()
    """E, the layers run, of the exits that have a loss besides the last layer, where the curriculum
    has them on; all if empty."""
    exit_weights: tuple[float, ...] = ()
    """For weights fixed: one for each of exits."""
    warmup_steps: int = 0
    """For weights fixed: exit_weights grow from 0 over so many steps."""
    distill: float = 0.0
    """Share of an exit's loss that is distillation from the last layer, 0 to 1: cross entropy goes
    to (1 - distill) CE + distill temperature^2 KL(last layer || exit). The last layer's own loss
    stays as it is, and gets no gradient from its students."""
    temperature: float = 1.0
    """Divides the logits of both distributions in the KL."""
    distill_states: StateMatching = "none"
    """Distillation of hidden states into the layers up to the deepest of exits, after E layers
    (FREE), at every step. last: the last layer teaches the E-th. uniform: E evenly spaced layers
    teach them, in order. dynamic: each of these teaches the nearest student below that of the
    teacher above. The squared difference of normed states, averaged over pairs, tokens and dim;
    teachers get no gradient."""
    distill_states_weight: float = 0.5
    """Weight of the distillation of states in the loss (FREE's alpha)."""
    z_loss: float = 0.0
    """Added to each token's cross entropy, at every exit: z_loss log^2 Z, of the softmax's
    normaliser Z. PaLM: 1e-4. 0: off. The reported losses leave it out."""
    confidence_weights: bool = False
    """Weigh each token's cross entropy, at the exits before the last, by its largest probability,
    which gets no gradient (EE-LLM's dynamic weights)."""
    token_fraction: float = 1.0
    """Share of each sequence's tokens that the exits before the last learn from, above 0 to 1:
    drawn anew at every step, the same for all exits, the loss scaled by its inverse. Their heads
    compute as much less; the reported losses are estimates."""
    chunk_rows: int = 4096
    """Tokens whose logits are in memory at once: chunk_rows * vocab_size numbers."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if not 0.0 <= self.e_scale <= 1.0:
            found.append(f"early_exit.e_scale: {self.e_scale}, must lie in [0, 1]")
        found += self._weight_problems()
        if not 0.0 <= self.distill <= 1.0:
            found.append(f"early_exit.distill: {self.distill}, must lie in [0, 1]")
        if not self.temperature > 0.0:
            found.append(f"early_exit.temperature: {self.temperature}, must be positive")
        if self.distill_states != "none" and not self.exits:
            found.append(
                f"early_exit.exits: none, distill_states {self.distill_states} needs the layers "
                "run before the shallow exit"
            )
        if not self.distill_states_weight > 0.0:
            found.append(
                f"early_exit.distill_states_weight: {self.distill_states_weight}, must be positive"
            )
        if not self.z_loss >= 0.0:
            found.append(f"early_exit.z_loss: {self.z_loss}, must not be negative")
        if not 0.0 < self.token_fraction <= 1.0:
            found.append(f"early_exit.token_fraction: {self.token_fraction}, must lie in (0, 1]")
        if self.chunk_rows < 1:
            found.append(f"early_exit.chunk_rows: {self.chunk_rows}, must be at least 1")
        return found

    def _weight_problems(self) -> list[str]:
        found = []
        if list(self.exits) != sorted(set(self.exits)) or any(E < 1 for E in self.exits):
            found.append(f"early_exit.exits: {self.exits}, must ascend from 1 layer or more")
        fixed = self.weights == "fixed"
        if fixed and (not self.exits or len(self.exit_weights) != len(self.exits)):
            found.append(
                f"early_exit.exit_weights: {self.exit_weights} for exits {self.exits}, weights "
                f"fixed needs one for each of at least one exit"
            )
        if not fixed and (self.exit_weights or self.warmup_steps):
            found.append(
                f"early_exit.exit_weights, warmup_steps: given for weights {self.weights}, "
                f"leave them out or set weights to fixed"
            )
        if any(weight < 0 for weight in self.exit_weights) or self.warmup_steps < 0:
            found.append("early_exit.exit_weights, warmup_steps: must not be negative")
        return found


class EarlyExitLoss(NamedTuple):
    """J and the loss of each exit."""

    total: Tensor
    """Scalar fp32: sum over exits of e_tilde * summed token loss; J is this, over the tokens."""
    per_exit: dict[int, Tensor]
    """{l: summed cross entropy of the exit after layer l}, scalar fp32 each, detached, unreduced;
    estimated from the tokens that the exit learnt from."""


def e(l: int, L: int, e_scale: float) -> float:
    """Return the unnormalised weight of the exit after layer l.

    LayerSkip, eq. 6:
        e(l)     = e_scale * sum_{i=0}^{l} i                    for 0 <= l < L - 1
        e(L - 1) = L - 1 + e_scale * sum_{i=0}^{L-2} i
    so e(0) = 0: the exit after the first layer is never trained. For L = 1 the last layer's
    weight would be 0 too; it is 1.
    """
    if L == 1:
        return 1.0
    if l == L - 1:
        return L - 1 + e_scale * (L - 1) * (L - 2) / 2
    return e_scale * l * (l + 1) / 2


def e_tilde(active: Sequence[int], L: int, e_scale: float) -> dict[int, float]:
    """Return {l: e_tilde(t, l)} for the layers with C(t, l) = 1.

    LayerSkip, eq. 5: e_tilde(t, l) = C(t, l) e(l) / sum_{i=0}^{L-1} C(t, i) e(i). Where every
    active e(l) is 0 (only layer 0, or e_scale = 0, without the last layer) there is nothing to
    train and all weights are 0.
    """
    weights = {l: e(l, L, e_scale) for l in active}
    total = sum(weights.values())
    return {l: weight / total if total else 0.0 for l, weight in weights.items()}


def exits_with_loss(active: Sequence[int], L: int, config: EarlyExitConfig) -> tuple[int, ...]:
    """Return those of the layers with C(t, l) = 1 that `config.exits` leaves, ascending."""
    if not config.exits:
        return tuple(active)
    return tuple(l for l in active if l + 1 in config.exits or l == L - 1)


def exit_weights(
    active: Sequence[int], t: int, L: int, config: EarlyExitConfig
) -> dict[int, float]:
    """Return {l: weight of the exit after layer l} at step t, for the layers with C(t, l) = 1.

    layerskip: see `e_tilde`. With E = l + 1:
      linear:  E / sum over active of E   (CALM, arXiv 2207.07061, section 3.4; PABEE, 2006.04152)
      uniform: 1 / number of active   (aligned training, arXiv 1910.10073)
      fixed:   1 at the last layer, w_E min(1, t / warmup_steps) else   (EE-LLM, arXiv 2312.04916)
    The first three sum to 1, fixed to 1 + sum of its w.
    """
    active = exits_with_loss(active, L, config)
    if config.weights == "layerskip":
        return e_tilde(active, L, config.e_scale)
    if config.weights == "linear":
        return {l: (l + 1) / sum(i + 1 for i in active) for l in active}
    if config.weights == "uniform":
        return {l: 1 / len(active) for l in active}
    grown = min(1.0, t / config.warmup_steps) if config.warmup_steps else 1.0
    w = {E - 1: weight * grown for E, weight in zip(config.exits, config.exit_weights, strict=True)}
    return {l: 1.0 if l == L - 1 else w[l] for l in active}


def early_exit_loss(
    hidden: Mapping[int, Tensor],
    head_weight: Tensor,
    labels: Tensor,
    weights: Mapping[int, float],
    *,
    config: EarlyExitConfig,
    tokens: Tensor | None = None,
    state_pairs: Sequence[StatePair] = (),
) -> EarlyExitLoss:
    """Return J(X, Y, t) = sum_l e_tilde(t, l) * J_CE(g(x_{l+1}), Y) (LayerSkip, section 4.1.2).

    J_CE is the sum over tokens here: the caller divides by the tokens of its global batch, so that
    gradients do not depend on how it is split. `config` may add to J_CE and to J.

    Args:
        hidden: {l: norm(x_{l+1})}, each (batch, seq, dim), of the layers in `weights` and
            `state_pairs`.
        head_weight: (vocab, dim), the one LM head all exits share.
        labels: (batch, seq) int64; IGNORE_INDEX is left out.
        weights: {l: e_tilde(t, l)}.
        config: The loss of an exit.
        tokens: (n,) int64 indices into (batch * seq), of those that the exits before the last learn
            from: equally many of each sequence, every one as likely. None: all.
        state_pairs: Students and teachers of the distillation of states.
    """
    *shallower, deepest = sorted(weights)
    chosen_labels = _choose(labels, tokens)
    scale = labels.numel() / chosen_labels.numel()
    students = [
        ExitTokens(
            _choose(hidden[l], tokens), chosen_labels, weights[l] * scale, config.confidence_weights
        )
        for l in shallower
    ]
    exits = [each._replace(weight=each.weight * (1.0 - config.distill)) for each in students]
    exits.append(ExitTokens(hidden[deepest], labels, weights[deepest]))
    total, sums = weighted_cross_entropy_sums(
        exits, head_weight, chunk_rows=config.chunk_rows, z_loss=config.z_loss
    )
    if config.distill and students:
        teacher = _choose(hidden[deepest], tokens)
        total = total + _distillation(students, teacher, head_weight, config)
    if state_pairs:
        dynamic = config.distill_states == "dynamic"
        distances = state_distance_sum(hidden, state_pairs, labels, dynamic=dynamic)
        total = total + config.distill_states_weight * distances
    *estimates, exact = sums.unbind()
    per_exit = {l: each * scale for l, each in zip(shallower, estimates, strict=True)}
    return EarlyExitLoss(total, per_exit | {deepest: exact})


def _distillation(
    students: Sequence[ExitTokens], teacher: Tensor, head_weight: Tensor, config: EarlyExitConfig
) -> Tensor:
    """Return the weighted divergence of the students from a teacher shaped like them."""
    return weighted_divergence_sum(
        [student.hidden for student in students],
        teacher,
        head_weight,
        students[0].labels,
        [student.weight * config.distill for student in students],
        temperature=config.temperature,
        chunk_rows=config.chunk_rows,
    )


def _choose(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Return rows `tokens` of x: (batch, seq) or (batch, seq, dim) as (n) or (n, dim)."""
    return x if tokens is None else x.flatten(0, 1).index_select(0, tokens)
