"""Thresholds certified to keep a risk low: fixed-sequence testing.

Learn then Test (arXiv 2110.01052), as in CALM (arXiv 2207.07061, section 4). Runs no model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One threshold and the result of its test."""

    threshold: float
    risk: float
    """Mean of the losses observed."""
    p_value: float
    """Of the hypothesis that its expected loss is above delta."""
    certified: bool


def hoeffding_bentkus(risk: float, n: int, delta: float) -> float:
    """Return a p-value for "the expected loss is above delta".

    Bates et al. (arXiv 2101.02703), section 3.1: for n independent losses in [0, 1] of mean `risk`,
      min( exp(-n h(min(risk, delta), delta)),  e P(Binomial(n, delta) <= ceil(n risk)) ),
      h(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)).

    Args:
        risk: Mean loss, in [0, 1].
        n: Number of losses.
        delta: The bound, in (0, 1).
    """
    a = min(risk, delta)
    h = (a * math.log(a / delta) if a > 0 else 0.0) + (
        (1 - a) * math.log((1 - a) / (1 - delta)) if a < 1 else 0.0
    )
    most = math.ceil(n * risk - 1e-9)
    tail = math.fsum(math.exp(_log_binomial(k, n, delta)) for k in range(most + 1))
    return min(1.0, math.exp(-n * h), math.e * tail)


def fewest_losses(delta: float, eps: float) -> int:
    """Return the number n of losses from which on anything can be certified, see `certify`.

    Where all of them are 0 the p-value is the least, (1 - delta)^n: n >= ln eps / ln(1 - delta).
    """
    n = math.ceil(min(math.log(eps) / math.log1p(-delta), 1e18))
    return n if hoeffding_bentkus(0.0, n, delta) <= eps else n + 1  # by rounding


def _log_binomial(k: int, n: int, p: float) -> float:
    """Return ln P(Binomial(n, p) = k), as the coefficients alone are too large for a float."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(p) + (n - k) * math.log1p(-p)


def certify(
    thresholds: Sequence[float],
    losses: Callable[[float], Sequence[float]],
    *,
    delta: float,
    eps: float,
) -> list[Tested]:
    """Test thresholds in turn until one cannot be certified.

    With probability 1 - eps over the losses, no certified threshold has an expected loss above
    delta.

    Args:
        thresholds: Safest first; they must not depend on the losses.
        losses: Returns the independent losses in [0, 1] at a threshold.
        delta: Largest expected loss allowed, in (0, 1).
        eps: Largest probability of a wrong certificate, in (0, 1).
    """
    tested: list[Tested] = []
    for threshold in thresholds:
        found = losses(threshold)
        risk = sum(found) / len(found)
        p_value = hoeffding_bentkus(risk, len(found), delta)
        tested.append(
            Tested(threshold=threshold, risk=risk, p_value=p_value, certified=p_value <= eps)
        )
        if p_value > eps:
            break
    return tested
