"""The search fits what it has measured, measures nothing twice, and finds what is best."""

import math
import random
from itertools import product

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from inference.fitting.bayesian_search import (
    NOISE,
    draw_candidates,
    expected_improvement,
    predict,
    propose,
    search,
)


def points(count, answers, seed):
    draw = random.Random(seed)
    return torch.tensor([[draw.random() < 0.5 for _ in range(answers)] for _ in range(count)])


@pytest.mark.parametrize("smooth", [False, True])
def test_prediction_is_that_of_the_likeliest_process(smooth):
    x, at = points(12, 6, seed=1).double(), points(5, 6, seed=2).double()
    y = x.sum(1) if smooth else torch.randn(12, dtype=torch.float64, generator=seeded(0))
    y = (y - y.mean()) / y.std(correction=0)

    def kernel(a, b, s):
        return torch.tensor([[math.exp(-sum(p != q) / (2 * s)) for q in b] for p in a]).double()

    def likelihood(s):
        covariance = kernel(x, x, s) + NOISE * torch.eye(12)
        return MultivariateNormal(torch.zeros(12).double(), covariance).log_prob(y)

    s = max((6 * share for share in (0.125, 0.25, 0.5, 1.0, 2.0)), key=likelihood)
    inverse = (kernel(x, x, s) + NOISE * torch.eye(12)).inverse()
    k = kernel(at, x, s)
    mean, deviation = predict(x, y, at)
    # Both are fp64; the kernel above is rounded to fp32 on its way.
    torch.testing.assert_close(mean, k @ inverse @ y, atol=1e-4, rtol=0)
    variance = 1 - (k @ inverse * k).sum(1)
    torch.testing.assert_close(deviation.square(), variance, atol=1e-4, rtol=0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_expected_improvement_is_its_integral():
    mean, deviation = (
        torch.tensor([0.3, -2.0, 1.5]).double(),
        torch.tensor([0.5, 1.0, 0.1]).double(),
    )
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = Normal(mean[:, None], deviation[:, None]).log_prob(grid).exp()
    integral = ((grid - 0.7).clamp(min=0) * weight).sum(1) * (grid[1] - grid[0])
    found = expected_improvement(mean, deviation, 0.7)
    torch.testing.assert_close(found, integral, atol=1e-6, rtol=0)


def valley(choice):
    """Most for one choice in 2^16; answers depend on their neighbours."""
    wanted = [i % 3 == 0 for i in range(16)]
    right = [a == b for a, b in zip(choice, wanted, strict=True)]
    return sum(right) + sum(a and b for a, b in zip(right, right[1:], strict=False))


def run(measure, answers, **options):
    starts = [(False,) * answers]
    return search(
        measure, starts, **({"iterations": 60, "seed": 0, "report": lambda line: None} | options)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_of_many_choices_is_found_where_chance_does_not(seed):
    found = [*run(valley, 16, seed=seed).values()]
    assert found == sorted(found, reverse=True)
    assert found[0] == 31
    draw = random.Random(seed)
    chance = max(valley([draw.random() < 0.5 for _ in range(16)]) for _ in range(60))
    assert chance < 28


def test_nothing_is_measured_twice_and_starts_come_first():
    measured = []

    def measure(choice):
        measured.append(choice)
        return valley(choice)

    again = run(measure, 16, iterations=30)
    assert len(measured) == len(set(measured)) == len(again) == 30
    assert measured[0] == (False,) * 16
    assert run(valley, 16, iterations=30) == again
    assert run(valley, 16, iterations=30, seed=1) != again


def test_the_search_ends_with_the_last_choice():
    found = run(sum, 3)
    assert {*found} == {*product((False, True), repeat=3)}
    assert next(iter(found)) == (True, True, True)


def test_values_that_are_all_the_same_do_no_harm():
    assert len(run(lambda choice: 1.0, 6, iterations=20)) == 20


def test_candidates_are_near_the_best_or_anywhere():
    best = (True,) * 20
    ones = [sum(choice) for choice in draw_candidates([best], seeded(0))]
    assert ones.count(19) >= 20
    assert sum(15 <= count <= 18 for count in ones) > 200
    assert min(ones) < 5


def test_what_is_proposed_beats_what_was_tried():
    # A choice drawn by chance, or the first neighbour of the best, seldom does.
    weights = [1.0, -1.0, 0.5, 2.0, -0.5, 1.5, -2.0, 0.7, 1.0, -1.2, 0.3, -0.9]

    def value(choice):
        return sum(w for w, answer in zip(weights, choice, strict=True) if answer)

    better = 0
    for seed in range(10):
        scores = {(*choice,): value(choice) for choice in points(40, 12, seed).tolist()}
        proposed = propose(scores, seeded(seed))
        assert proposed not in scores
        better += value(proposed) > max(scores.values())
    assert better >= 9
