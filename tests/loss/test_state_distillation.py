"""Distilled states, against a slow form that takes one sequence at a time with torch's autograd."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss.softmax import IGNORE_INDEX
from loss.state_distillation import (
    StatePair,
    closest_pairs,
    state_distance_sum,
    state_pairs,
    teacher_layers,
)


def test_teachers_are_those_of_the_authors_table_where_it_is_even():
    assert teacher_layers(24, 12) == tuple(range(1, 24, 2))
    assert teacher_layers(24, 8) == (2, 5, 8, 11, 14, 17, 20, 23)
    assert teacher_layers(24, 6) == (3, 7, 11, 15, 19, 23)
    assert teacher_layers(24, 4) == (5, 11, 17, 23)
    assert teacher_layers(12, 3) == (3, 7, 11)


@pytest.mark.parametrize(("L", "E"), [(2, 1), (8, 2), (8, 7), (24, 10), (32, 31)])
def test_teachers_are_evenly_spaced_end_with_the_last_layer_and_are_above_their_students(L, E):
    teachers = teacher_layers(L, E)
    assert len(teachers) == E
    assert teachers[-1] == L - 1
    gaps = {b - a for a, b in zip(teachers, teachers[1:], strict=False)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert all(pair.student < pair.teacher for pair in state_pairs(L, E, "dynamic"))


def test_pairs_equal_the_lists_worked_by_hand():
    assert state_pairs(8, 2, "none") == ()
    assert state_pairs(8, 2, "last") == ((1, 7),)
    assert state_pairs(8, 2, "uniform") == ((0, 3), (1, 7))
    assert state_pairs(8, 2, "dynamic") == ((0, 3), (0, 7), (1, 7))


def test_each_teacher_takes_the_nearest_student_below_the_last_one_taken():
    pairs = state_pairs(6, 3, "dynamic")  # teachers 1, 3, 5; students 0 | 0, 1 | 0, 1, 2
    distances = torch.tensor(
        [
            [9.0, 9.0, 0.0],
            [5.0, 5.0, 0.0],
            [1.0, 1.0, 0.0],
            [3.0, 1.0, 0.0],
            [2.0, 2.0, 0.0],
            [1.0, 3.0, 0.0],
        ]
    )
    chosen = closest_pairs(distances, pairs)
    taken = [[pairs[i] for i in range(6) if chosen[i, b]] for b in range(3)]
    assert taken[0] == [(0, 1), (1, 3), (2, 5)]
    # Teacher 5 takes student 0: there is none below it, so it is taken again and again.
    assert taken[1] == taken[2] == [(0, 1), (0, 3), (0, 5)]


def inputs(layers=(0, 1, 2, 3, 5, 8), batch=4, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    states = {l: torch.randn(batch, 7, dim, generator=g).requires_grad_() for l in layers}
    labels = torch.randint(9, (batch, 7), generator=g)
    labels[0, 2:] = IGNORE_INDEX
    labels[1] = IGNORE_INDEX
    return states, labels


def slow_distances(states, labels, matching, E=3):
    """Write it as FREE does, for one sequence at a time; three students, teachers 2, 5, 8 of 9."""
    teachers, total, taken = (2, 5, 8), 0.0, []
    for b in range(len(labels)):
        has_loss = labels[b] != IGNORE_INDEX
        if not has_loss.any():
            continue

        def mse(student, teacher, b=b, has_loss=has_loss):
            difference = states[student][b, has_loss] - states[teacher][b, has_loss].detach()
            return difference.double().pow(2).mean()

        if matching == "last":
            mean = mse(E - 1, 8)
        elif matching == "uniform":
            mean = sum(mse(i, teacher) for i, teacher in enumerate(teachers)) / E
        else:
            mean, bound = 0.0, E
            for teacher in reversed(teachers):
                below = sorted(range(bound), key=lambda l, teacher=teacher: mse(l, teacher).item())
                bound = below[0] if below else bound
                taken.append((b, bound, teacher))
                mean = mean + mse(bound, teacher) / E
        total = total + mean * has_loss.sum()
    return total, taken


@pytest.mark.parametrize("matching", ["last", "uniform", "dynamic"])
@pytest.mark.parametrize("seed", range(3))
def test_distances_and_gradients_equal_the_slow_form(matching, seed):
    pairs, outcomes = state_pairs(9, 3, matching), []
    for form in ("ours", "slow"):
        states, labels = inputs(seed=seed)
        if form == "ours":
            total = state_distance_sum(states, pairs, labels, dynamic=matching == "dynamic")
        else:
            total, taken = slow_distances(states, labels, matching)
            assert matching != "dynamic" or len({student for _, student, _ in taken}) > 1
        (total / 3).backward()
        outcomes.append((total.detach().float(), {l: h.grad for l, h in states.items()}))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])
    for l, grad in outcomes[0][1].items():
        if outcomes[1][1][l] is None:
            assert grad is None or not grad.any()
        else:
            torch.testing.assert_close(grad, outcomes[1][1][l])


def test_a_teacher_gets_no_gradient_from_its_students():
    states, labels = inputs()
    state_distance_sum(states, state_pairs(9, 3, "dynamic"), labels, dynamic=True).backward()
    assert states[5].grad is None
    assert states[8].grad is None
    # Layer 2 is the third student and the first teacher.
    states, labels = inputs()
    state_distance_sum(states, [StatePair(0, 2)], labels, dynamic=False).backward()
    assert states[2].grad is None
    assert states[0].grad.any()


def test_the_split_over_microbatches_does_not_matter():
    pairs = state_pairs(9, 3, "dynamic")
    outcomes = []
    for rows in (4, 2, 1):
        states, labels = inputs()
        for begin in range(0, 4, rows):
            part = slice(begin, begin + rows)
            microbatch = {l: h[part] for l, h in states.items()}
            state_distance_sum(microbatch, pairs, labels[part], dynamic=True).backward()
        outcomes.append([states[l].grad for l in range(3)])
    for split in outcomes[1:]:
        torch.testing.assert_close(split, outcomes[0])


class LiveStates(TorchDispatchMode):
    """Count the tensors of the shape of a state that were made here and are alive at once."""

    def __init__(self, given):
        super().__init__()
        self.given = {h.untyped_storage()._cdata for h in given}
        self.shape, self.live, self.peak = given[0].shape, set(), 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape:
            storage = out.untyped_storage()
            key = storage._cdata
            if key not in self.live | self.given:
                self.live.add(key)
                weakref.finalize(storage, self.live.discard, key)
            self.peak = max(self.peak, len(self.live))
        return out


@pytest.mark.parametrize("E", [2, 6])
def test_memory_grows_by_the_gradient_of_each_student_and_nothing_else(E):
    states, labels = inputs(layers=range(12))
    with LiveStates(list(states.values())) as counter:
        pairs = state_pairs(12, E, "dynamic")
        state_distance_sum(states, pairs, labels, dynamic=True).backward()
    assert counter.peak == E + 1  # the gradients and one pair's difference
