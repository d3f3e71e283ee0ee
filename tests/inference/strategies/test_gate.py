"""Rows exit where a gate scores enough, and a gate that does not fit is refused."""

import pytest

from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.gate import Gate
from inference.strategies.gate_classifiers import FORMS, save_gate
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.strategies.test_gate_classifiers import EXITS, random_gate
from tests.models.test_llama import build, small


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def gate_file(model, tmp_path):
    def write(form="linear", exits=EXITS):
        path = tmp_path / f"{form}.safetensors"
        save_gate(path, random_gate(form, exits), model)
        return path

    return write


@pytest.mark.parametrize("form", FORMS)
def test_rows_exit_where_the_gate_scores_enough_and_as_they_would_alone(model, gate_file, form):
    path = gate_file(form)
    plain = decode(model, PROMPTS, Autoregressive()).tokens
    assert decode(model, PROMPTS, Gate(path=path, threshold=1.5)).tokens == plain
    rule = Gate(path=path, threshold=0.3)
    together = decode(model, PROMPTS, rule)
    assert together.tokens == [decode(model, [p], rule).tokens[0] for p in PROMPTS]
    assert together.counters.layers_per_token < 6
    calm = Calm(confidence="gate", gate=path, threshold=0.3)
    assert decode(model, PROMPTS, calm).tokens == together.tokens
    at_once = decode(model, PROMPTS, Gate(path=path, threshold=0.0)).counters
    assert at_once.syncs <= at_once.rounds  # all leave at the first exit


def test_what_does_not_fit_is_refused_in_one_line(model, gate_file, tmp_path):
    def message(strategy, of=model):
        with pytest.raises(ValueError, match=".") as caught:
            decode(of, PROMPTS, strategy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message(Gate()).startswith("path: none, give a file that")
    assert message(Gate(path=tmp_path / "x")).startswith("gate: there is no")
    path = gate_file()
    other = build(small(n_layers=6, n_kv_heads=2), seed=9).eval().requires_grad_(False)
    assert "was fitted to another checkpoint" in message(Gate(path=path), other)
    assert message(Gate(path=path, threshold=-0.1)).startswith("threshold: -0.1")
    assert message(Calm(confidence="gate")).startswith("gate: none, give a file")
    assert "it needs confidence=gate" in message(Calm(gate=path))
    sparse = gate_file("multinomial", range(2, 6, 2))
    assert "first=2:interval=2" in message(Calm(confidence="gate", gate=sparse))
