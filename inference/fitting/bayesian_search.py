"""Bayesian optimisation over vectors of booleans. Runs no model.

A Gaussian process is fitted to the choices tried so far, and the one of most expected improvement
is tried next. Everything is fp64 on the CPU and seeded.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

NOISE = 1e-2
"""Variance of a measurement where all values have variance 1."""
_RANDOM_STARTS = 8
_RANDOM_CANDIDATES = 512
_LINE_INTERVAL_SECONDS = 10.0

Choice = tuple[bool, ...]
"""One boolean for each question."""


def search(
    measure: Callable[[Choice], float],
    starts: Sequence[Choice],
    *,
    iterations: int,
    seed: int,
    report: Callable[[str], None],
) -> dict[Choice, float]:
    """Try choices, each the most promising by those before.

    Args:
        measure: Returns the score to be maximised.
        starts: Tried first, and after them a few random ones; at least one.
        iterations: Choices to try; fewer if there are fewer.
        seed: Of everything random.
        report: Called with a line of progress at every new best, and every 10 seconds.

    Returns:
        The scores, best first.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = [*starts, *draw_candidates(starts, generator)[-_RANDOM_STARTS:]]
    scores: dict[Choice, float] = {}
    begun = reported = time.monotonic()
    while len(scores) < iterations:
        untried = [start for start in starts if start not in scores]
        choice = untried[0] if untried else propose(scores, generator)
        if choice is None:
            break
        score = measure(choice)
        is_best = score > max(scores.values(), default=-torch.inf)
        scores[choice] = score
        now = time.monotonic()
        if is_best or now - reported > _LINE_INTERVAL_SECONDS:
            best, reported = max(scores.values()), now
            report(f"trial {len(scores)} of {iterations}: best {best:.4g}, {now - begun:.0f} s")
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def propose(scores: Mapping[Choice, float], generator: torch.Generator) -> Choice | None:
    """Return the choice of most expected improvement over those tried; None if none is left."""
    best = sorted(scores, key=lambda choice: -scores[choice])[:3]
    new = [choice for choice in draw_candidates(best, generator) if choice not in scores]
    if not new:
        return None
    y = torch.tensor([*scores.values()], dtype=torch.float64)
    y = (y - y.mean()) / y.std(correction=0).clamp(min=1e-9)
    x, at = (torch.tensor([*points], dtype=torch.float64) for points in (scores, new))
    return new[int(expected_improvement(*predict(x, y, at), float(y.max())).argmax())]


def draw_candidates(best: Sequence[Choice], generator: torch.Generator) -> list[Choice]:
    """Return candidates for the next choice.

    Those that differ from the best so far in one boolean or in a few, and random ones of every
    density.
    """
    near, answers = torch.tensor(best), len(best[0])

    def drawn(share: Tensor) -> Tensor:
        return torch.rand(_RANDOM_CANDIDATES, answers, generator=generator) < share

    one = (near[:, None] ^ torch.eye(answers, dtype=torch.bool)).flatten(0, 1)
    rows = torch.randint(len(best), (_RANDOM_CANDIDATES,), generator=generator)
    few = near[rows] ^ drawn(torch.tensor(3.0 / answers))
    anywhere = drawn(torch.rand(_RANDOM_CANDIDATES, 1, generator=generator))
    return [*dict.fromkeys(map(tuple, torch.cat((one, few, anywhere)).tolist()))]


def predict(x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a Gaussian process at points not yet measured.

    Its kernel is exp(-|x - x'|^2 / (2 s)), where |x - x'|^2 is the number of booleans in which two
    choices differ. Of a few s, the one of largest marginal likelihood is used.

    Args:
        x: (n, answers) fp64 of 0 and 1, the points measured.
        y: (n,) fp64, their values, of mean 0 and variance 1.
        at: (m, answers) fp64.

    Returns:
        Two tensors, (m,) fp64.
    """
    near, far = torch.cdist(x, x, p=1), torch.cdist(at, x, p=1)
    fits = []
    for share in (0.125, 0.25, 0.5, 1.0, 2.0):
        s = share * x.shape[1]
        noise = NOISE * torch.eye(len(x), dtype=x.dtype)
        lower = torch.linalg.cholesky((-near / (2 * s)).exp() + noise)
        weights = torch.cholesky_solve(y[:, None], lower)[:, 0]
        fits.append((float(-0.5 * y @ weights - lower.diagonal().log().sum()), s, lower, weights))
    _, s, lower, weights = max(fits, key=lambda fit: fit[0])
    k = (-far / (2 * s)).exp()
    known = torch.linalg.solve_triangular(lower, k.T, upper=False).square().sum(0)
    return k @ weights, (1.0 - known).clamp(min=1e-12).sqrt()


def expected_improvement(mean: Tensor, deviation: Tensor, best: float) -> Tensor:
    """Return E[max(0, f - best)] for normal f with this mean and deviation, all (m,)."""
    z = (mean - best) / deviation
    density = (-0.5 * z.square()).exp() / (2 * torch.pi) ** 0.5
    return (mean - best) * torch.special.ndtr(z) + deviation * density
