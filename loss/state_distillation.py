"""Distillation of hidden states: shallow layers learn the states of deep layers.

FREE (arXiv 2310.05424): of a shallow exit after E layers, the layers up to it are students, and as
many deep layers are teachers. A layer's state is norm(x_{l+1}), its exit's input, as in the
authors' code; l = layer index from 0. Gradients are taken on the way forward, as in
`cross_entropy`; a teacher's state is a constant. Independent of the head.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from loss.cross_entropy import scaled_gradients
from loss.softmax import IGNORE_INDEX

StateMatching = Literal["none", "last", "uniform", "dynamic"]


class StatePair(NamedTuple):
    """A student and a teacher that it may learn from, as layer indices l."""

    student: int
    teacher: int


def teacher_layers(L: int, E: int) -> tuple[int, ...]:
    """Return E layers l of L, evenly spaced, ending with the last: ceil(i L / E) - 1, i = 1 to E.

    For E = 6 of L = 24 they are 3, 7, 11, 15, 19 and 23, as in the authors' table. Each is deeper
    than the student of its rank.
    """
    return tuple(-(-i * L // E) - 1 for i in range(1, E + 1))


def state_pairs(L: int, E: int, matching: StateMatching) -> tuple[StatePair, ...]:
    """Return the candidate pairs of student and teacher, by teacher and then by student ascending.

    last: layer E - 1 from layer L - 1. uniform: each student from the teacher of its rank. dynamic:
    the choice is left to `closest_pairs`, where the i-th teacher can only get the i-th student or
    one below.

    Args:
        L: Number of layers.
        E: Layers run before the shallow exit.
        matching: The rule.
    """
    if matching == "none":
        return ()
    if matching == "last":
        return (StatePair(E - 1, L - 1),)
    teachers = enumerate(teacher_layers(L, E))
    if matching == "uniform":
        return tuple(StatePair(i, teacher) for i, teacher in teachers)
    return tuple(StatePair(l, teacher) for i, teacher in teachers for l in range(i + 1))


def closest_pairs(distances: Tensor, pairs: Sequence[StatePair]) -> Tensor:
    """Choose, for every sequence, one student for each teacher.

    From the deepest teacher down, take the nearest student below the one taken before; once the
    lowest is taken, it is taken again (FREE's dynamic layer matching). The authors choose once for
    a batch, padding included; here every sequence has its own choice, so that gradients do not
    depend on how the global batch is split over ranks and microbatches. No synchronisation.

    Args:
        distances: (pairs, batch).
        pairs: The candidates of `state_pairs`.

    Returns:
        (pairs, batch) bool, True once for each teacher and sequence.
    """
    chosen = torch.empty_like(distances, dtype=torch.bool)
    end, bound = len(pairs), torch.full_like(chosen[0], len(pairs), dtype=torch.int64)
    while end:
        candidates = sum(pair.teacher == pairs[end - 1].teacher for pair in pairs)
        begin = end - candidates
        student = torch.arange(candidates, device=distances.device).unsqueeze(-1)
        allowed = student < bound.clamp(min=1)
        bound = torch.where(allowed, distances[begin:end], torch.inf).argmin(0)
        chosen[begin:end] = student == bound
        end = begin
    return chosen


def state_distance_sum(
    states: Mapping[int, Tensor], pairs: Sequence[StatePair], labels: Tensor, *, dynamic: bool
) -> Tensor:
    """Return the sum over tokens of the mean over teachers and dim of (student - teacher)^2.

    Args:
        states: {l: norm(x_{l+1})}, (batch, seq, dim) each, of every layer in `pairs`.
        pairs: Of `state_pairs`.
        labels: (batch, seq) int64; a position of IGNORE_INDEX does not count.
        dynamic: Use one of each teacher's pairs, by `closest_pairs`; False: all.

    Returns:
        Scalar fp32, differentiable in the students' states and in no teacher's.
    """
    students = sorted({pair.student for pair in pairs})
    teachers = {pair.teacher: states[pair.teacher].detach() for pair in pairs}
    total: Tensor = _StateDistance.apply(
        students, teachers, pairs, labels, dynamic, *(states[l] for l in students)
    )
    return total


class _StateDistance(torch.autograd.Function):
    """All pairs at once: each student's gradient is summed over its teachers."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[int],
        teachers: Mapping[int, Tensor],
        pairs: Sequence[StatePair],
        labels: Tensor,
        dynamic: bool,
        *students: Tensor,
    ) -> Tensor:
        state = dict(zip(layers, students, strict=True))
        share = (labels != IGNORE_INDEX) / (len(teachers) * students[0].shape[-1])  # (batch, seq)
        distances = torch.stack(
            [
                (_difference(state, teachers, pair).square().sum(-1) * share).sum(-1)
                for pair in pairs
            ]
        )
        chosen = torch.ones_like(distances)
        if dynamic:
            chosen = closest_pairs(distances, pairs).to(distances.dtype)
        grads = {l: torch.zeros_like(h) for l, h in state.items()}
        for pair, taken in zip(pairs, chosen, strict=True):
            slope = (2.0 * taken[:, None] * share).unsqueeze(-1)
            grads[pair.student] += _difference(state, teachers, pair).mul_(slope)
        ctx.grads = (None, list(grads.values()))
        return (distances * chosen).sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        _, grads = scaled_gradients(ctx, grad_total)
        return None, None, None, None, None, *grads


def _difference(
    students: Mapping[int, Tensor], teachers: Mapping[int, Tensor], pair: StatePair
) -> Tensor:
    """Return student - teacher, (batch, seq, dim) fp32."""
    return students[pair.student].float() - teachers[pair.teacher].float()
