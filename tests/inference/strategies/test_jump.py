"""Linear maps are used at exits without a trace."""

import pytest
import torch

from inference.fitting.jump_fitting import fit_jump
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.early_exit import EarlyExit
from inference.strategies.jump import Jump
from inference.strategies.jump_maps import JumpMap, load_jump, save_jump
from inference.strategies.patience import Patience
from tests.inference.every_strategy import PROMPTS, decode, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 50, (40, 16), generator=torch.Generator().manual_seed(0))


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
