"""Maps are fitted as least squares, and measured as a slow form measures them."""

import pytest
import torch

from inference.fitting.jump_fitting import fit_jump, measure_jump
from tests.inference.every_strategy import make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 50, (40, 16), generator=torch.Generator().manual_seed(0))


def states(model, windows):
    _, x = model.run_layers(model.embed(windows), 0, 6, exit_layers=range(6))
    return [x[l].flatten(0, 1) for l in range(6)]


def error(A, x, y):
    return (x @ A.T - y).square().sum().item()


def as_matrix(jump, E):
    return jump(E, torch.eye(32)).T


def test_a_full_map_is_the_least_squares_solution(model, windows):
    jump = fit_jump(model, windows, rank=None, ridge=0.0)
    x = states(model, windows)
    for E in range(1, 6):
        A = torch.linalg.lstsq(x[E - 1].double(), x[5].double()).solution.T
        best, ours = (
            error(A, x[E - 1].double(), x[5].double()),
            error(as_matrix(jump, E).double(), x[E - 1].double(), x[5].double()),
        )
        assert ours == pytest.approx(best, rel=1e-3)


def test_no_map_of_that_rank_is_nearer(model, windows):
    """Reduced-rank regression: the best of rank r, by the singular values of the fitted values."""
    jump = fit_jump(model, windows, rank=3, ridge=0.0)
    x = states(model, windows)
    for E in (1, 4):
        X, Y = x[E - 1].double(), (x[5] - x[E - 1]).double()
        fitted = X @ torch.linalg.lstsq(X, Y).solution
        U, S, V = torch.linalg.svd(fitted, full_matrices=False)
        least = ((U[:, :3] * S[:3]) @ V[:3] - Y).square().sum().item()
        A = as_matrix(jump, E).double()
        assert torch.linalg.matrix_rank(A - torch.eye(32), tol=1e-4) == 3
        assert error(A, X, x[5].double()) == pytest.approx(least, rel=1e-3)


def test_a_large_ridge_leaves_the_exit_as_it_is(model, windows):
    jump = fit_jump(model, windows, rank=None, ridge=1e9)
    h = torch.randn(5, 32)
    assert torch.allclose(jump(2, h), h, atol=1e-5)
    assert jump(6, h) is h


def test_what_is_measured_is_what_a_slow_form_finds(model, windows):
    jump = fit_jump(model, windows, rank=None, ridge=1e-4)
    x, found = states(model, windows), measure_jump(model, jump, windows)
    last = model.exit_logits(x[5]).argmax(-1)
    spread = (x[5] - x[5].mean(0)).square().sum()
    for fit in found:
        h = x[fit.E - 1]
        for at, r2, agreement, surprisal in (
            (h, fit.r2_identity, fit.agreement_identity, fit.surprisal_identity),
            (jump(fit.E, h), fit.r2, fit.agreement, fit.surprisal),
        ):
            assert r2 == pytest.approx(1 - ((at - x[5]).square().sum() / spread).item(), abs=1e-4)
            logits = model.exit_logits(at)
            assert agreement == pytest.approx((logits.argmax(-1) == last).float().mean().item())
            nll = -logits.log_softmax(-1).gather(1, last[:, None]).mean().item()
            assert surprisal == pytest.approx(nll, abs=1e-4)
        assert fit.r2 >= fit.r2_identity
