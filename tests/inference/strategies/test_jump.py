"""Linear maps to the last layer: fitted as least squares, and used at exits without a trace."""

import pytest
import torch

from inference.fitting.jump_fitting import fit_jump, measure_jump
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.early_exit import EarlyExit
from inference.strategies.jump import Jump
from inference.strategies.jump_maps import JumpMap, load_jump, save_jump
from inference.strategies.patience import Patience
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.models.test_llama import build, small


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


def test_maps_come_back_from_their_file_for_their_checkpoint_alone(model, windows, tmp_path):
    jump = fit_jump(model, windows, rank=2, ridge=1e-4)
    save_jump(tmp_path / "j", jump, model, {"rank": "2"})
    h = torch.randn(3, 32)
    assert torch.equal(load_jump(tmp_path / "j", model)(3, h), jump(3, h))
    other = build(small(n_layers=6, n_kv_heads=2), seed=9)
    with pytest.raises(ValueError, match="fitted to another checkpoint"):
        load_jump(tmp_path / "j", other)


@pytest.fixture
def no_map(model, tmp_path):
    """A file of maps that change nothing."""
    path = tmp_path / "identity"
    zeros = {f"{E}.B": torch.zeros(32, 32) for E in range(1, 6)}
    save_jump(path, JumpMap(zeros), model, {})
    return path


@pytest.mark.parametrize("E", [1, 3, 6])
def test_a_map_that_changes_nothing_is_static_exit(model, no_map, E):
    jumped = decode(model, PROMPTS, Jump(path=no_map, E=E))
    assert jumped.tokens == decode(model, PROMPTS, EarlyExit(E=E)).tokens
    assert jumped.counters.layers_per_token == E


@pytest.mark.parametrize("rule", [Calm(threshold=0.1), Patience(patience=1)])
def test_a_map_that_changes_nothing_leaves_rules_as_they_are(model, no_map, rule):
    kind, settings = type(rule), {k: v for k, v in vars(rule).items() if k != "jump"}
    mapped = decode(model, PROMPTS, kind(**settings, jump=no_map))
    assert mapped.tokens == decode(model, PROMPTS, rule).tokens


def test_a_map_is_read_by_the_head_and_not_by_later_layers(model, windows, tmp_path):
    path = tmp_path / "j"
    save_jump(path, fit_jump(model, windows, rank=None, ridge=1e-4), model, {})
    never = decode(model, PROMPTS, Calm(threshold=1.5, jump=path)).tokens
    assert never == decode(model, PROMPTS, Autoregressive()).tokens
    calm = Calm(threshold=0.05, jump=path)
    together = decode(model, PROMPTS, calm).tokens
    assert together == [decode(model, [prompt], calm).tokens[0] for prompt in PROMPTS]
    prompt = PROMPTS[2]
    [first, *_] = decode(model, [prompt], Jump(path=path, E=2)).tokens[0]
    h, _ = model.run_layers(model.embed(torch.tensor([prompt])), 0, 2)
    assert first == int(model.exit_logits(load_jump(path, model)(2, h[0, -1])).argmax())


@pytest.mark.parametrize(("settings", "line"), [({}, "path: none"), ({"E": 7}, "E: 7, jump needs")])
def test_settings_that_do_not_fit_are_refused(model, no_map, settings, line):
    strategy = Jump(**({"path": no_map} | settings if settings else {}))
    with pytest.raises(ValueError, match=f"^{line}"):
        decode(model, PROMPTS, strategy)
