"""P-values are those of a slow reference, and certified thresholds are as safe as promised."""

import math
import random
from fractions import Fraction

import pytest

from inference.fitting.learn_then_test import certify, fewest_losses, hoeffding_bentkus


@pytest.mark.parametrize("delta", [0.05, 0.1, 0.3])
@pytest.mark.parametrize(
    ("wrong", "n"),
    # Small losses add up to no whole number; Bentkus rounds it up.
    [(0, 60), (1, 60), (3, 60), (10, 60), (40, 60), (0.2, 60), (2.5, 60), (3.9, 60), (59.5, 60)]
    + [(0, 3000), (120.5, 3000), (240, 3000), (270, 3000)],
)
def test_the_p_value_is_the_formulas(wrong, n, delta):
    d = Fraction(str(delta))
    most = min(k for k in range(n + 1) if k >= wrong)
    # Over one denominator, or the sum of fractions would take seconds.
    ways = sum(
        math.comb(n, k) * d.numerator**k * (d.denominator - d.numerator) ** (n - k)
        for k in range(most + 1)
    )
    tail = Fraction(ways, d.denominator**n)
    a = min(wrong / n, delta)
    divergence = sum(x * math.log(x / y) for x, y in ((a, delta), (1 - a, 1 - delta)) if x)
    expected = min(1.0, math.exp(-n * divergence), math.e * float(tail))
    assert hoeffding_bentkus(wrong / n, n, delta) == pytest.approx(expected, rel=1e-9)


def test_no_evidence_and_much_evidence():
    assert hoeffding_bentkus(0.5, 100, 0.1) == 1.0
    assert hoeffding_bentkus(0.0, 100, 0.1) == pytest.approx(0.9**100)
    assert hoeffding_bentkus(0.0, 1_000_000, 0.1) == 0.0, "below the least float"
    # Four standard deviations below delta the tail is nearly the normal one, Phi(-4).
    far = hoeffding_bentkus(0.1 - 4 * 0.3 / 100_000**0.5, 100_000, 0.1)
    assert far == pytest.approx(math.e * 3.167e-5, rel=0.1)


@pytest.mark.parametrize("delta", [0.9, 0.5, 0.1, 0.05, 0.003])
@pytest.mark.parametrize("eps", [0.5, 0.05, 0.01])
def test_fewer_losses_than_the_fewest_certify_nothing(delta, eps):
    fewest = fewest_losses(delta, eps)
    for n in (fewest - 1, fewest):
        if n:
            [tested] = certify([1.0], lambda _, n=n: [0.0] * n, delta=delta, eps=eps)
            assert tested.certified == (n == fewest)
    assert (fewest_losses(0.1, 0.05), fewest_losses(0.1, 0.99)) == (29, 1)
    assert fewest_losses(5e-324, 5e-324) >= 10**18


def test_testing_ends_at_the_first_threshold_that_is_not_certified():
    risks = {1.0: 0.0, 0.9: 0.01, 0.8: 0.3, 0.7: 0.0}
    tested_thresholds = []

    def losses(threshold):
        tested_thresholds.append(threshold)
        return [risks[threshold]] * 200

    tested = certify([*risks], losses, delta=0.1, eps=0.05)
    assert tested_thresholds == [1.0, 0.9, 0.8]
    assert [t.certified for t in tested] == [True, True, False]


def test_what_is_certified_is_within_delta_as_often_as_promised():
    draw, delta, eps, wrong, useful, trials = random.Random(0), 0.2, 0.1, 0, 0, 400
    for _ in range(trials):
        tested = certify(
            [1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
            # The expected loss is (1 - threshold) / 2: 0.2 at the threshold 0.6.
            lambda threshold: [float(draw.random() < (1 - threshold) / 2) for _ in range(100)],
            delta=delta - 1e-3,  # so that 0.6 itself is just too much
            eps=eps,
        )
        lowest = min((t.threshold for t in tested if t.certified), default=1.0)
        wrong += lowest <= 0.6
        useful += lowest <= 0.8
    assert 0 < wrong / trials <= eps
    assert useful / trials > 0.7
