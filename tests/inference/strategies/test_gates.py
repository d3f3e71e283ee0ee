"""Gates: their losses against slow forms, their files, and what they decode."""

import math

import pytest
import torch

from inference.evaluation.rule_quality import area_under_roc
from inference.fitting.gate_training import (
    all_scores,
    balance,
    balanced_loss,
    fit_gate,
    stopping_loss,
)
from inference.fitting.traces import Trace, record
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.gate import Gate
from inference.strategies.gate_classifiers import FORMS, STOPPING, new_gate, save_gate
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.models.test_llama import build, small

EXITS = range(1, 6)


@pytest.fixture(scope="module")
def model():
    return make_model()


def random_gate(form, exits=EXITS, dim=32, scale=0.5):
    generator = torch.Generator().manual_seed(1)
    gate = new_gate(form, exits, dim, hidden=7, generator=generator)
    for tensor in gate.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return gate


@pytest.fixture
def gate_file(model, tmp_path):
    def write(form="linear", exits=EXITS):
        path = tmp_path / f"{form}.safetensors"
        save_gate(path, random_gate(form, exits), model)
        return path

    return write


def learnable(tokens=4000, dim=8):
    """States whose first number says whether the exit is right."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, tokens, dim, generator=generator)
    agrees = states[..., 0] > torch.tensor([1.0, 0.0, -1.0])[:, None]
    return Trace(range(1, 4), states, torch.zeros(3, tokens), agrees)


@pytest.mark.parametrize("form", FORMS)
def test_scores_lie_in_0_to_1_and_are_what_the_form_says(form):
    gate = random_gate(form)
    states = torch.randn(5, 11, 32)
    for n, E in enumerate(EXITS):
        score = gate.score(E, states[n], states[0])
        for i, h in enumerate(states[0 if form == "multinomial" else n]):
            x = h / (h.square().mean() + torch.finfo(torch.float32).eps).sqrt()
            if form == "mlp":
                x = (gate.tensors["w_in"][n] @ x + gate.tensors["b_in"][n]).clamp(min=0)
            out = gate.tensors["w"] @ x + gate.tensors["b"]
            if form == "multinomial":
                expected = out.softmax(-1)[: n + 1].sum()
            else:
                expected = out[0 if form in ("lte", "geometric") else n].sigmoid()
            assert score[i].item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.equal(all_scores(gate, states)[2], gate.score(3, states[2], states[0]))


@pytest.mark.parametrize("form", STOPPING)
def test_stopping_loss_is_minus_log_of_the_chance_to_stop_where_one_should(form):
    agrees = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 1, 1]]).bool()  # (exits, tokens)
    should = [3, 0, 1]  # the last layer, and the first exit that is right
    shape = (1, 3, 4) if form == "multinomial" else (3, 3, 1)
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    total = 0.0
    for token, n in enumerate(should):
        if form == "multinomial":
            total -= outputs[0, token].log_softmax(-1)[n].item()
            continue
        h = outputs[:, token, 0].sigmoid().tolist()
        chance = math.prod(1 - stop for stop in h[:n]) * (h[n] if n < 3 else 1.0)
        total -= math.log(chance)
    assert stopping_loss(form, outputs, agrees).item() == pytest.approx(total / 3, rel=1e-5)


def test_both_answers_weigh_the_same_in_the_balanced_loss():
    agrees = torch.zeros(1, 100, dtype=torch.bool)
    agrees[0, :9] = True
    odds = balance(agrees, shared=False)
    assert odds.item() == pytest.approx(10 / 92)
    outputs = torch.zeros(1, 100, requires_grad=True)
    balanced_loss(outputs, agrees, torch.tensor([9 / 91])).backward()
    pull = outputs.grad
    assert pull[agrees].sum().item() == pytest.approx(-pull[~agrees].sum().item(), rel=1e-5)
    assert torch.allclose(balance(agrees.expand(3, -1), shared=True), torch.tensor(28 / 274))


@pytest.mark.parametrize("form", ["lte", "linear", "mlp", "halting"])
def test_a_fitted_gate_tells_right_from_wrong(form):
    trace = learnable()
    gate = fit_gate(trace, form, epochs=20, hidden=16, seed=0)
    scores = all_scores(gate, trace.states)
    areas = [area_under_roc(s, a) for s, a in zip(scores, trace.agrees, strict=True)]
    assert areas[0] > 0.9
    if form in ("linear", "mlp"):  # each exit has its own
        assert min(areas) > 0.9
        rate = trace.agrees.float().mean(1)
        assert torch.allclose(scores.mean(1), rate, atol=0.05)  # probabilities, odds restored
    assert not any(tensor.requires_grad for tensor in gate.tensors.values())


def test_a_trace_holds_what_the_exits_see_and_say(model):
    windows = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(3))
    trace = record(model, windows, EXITS, "")
    _, x = model.run_layers(model.embed(windows), 0, 6, exit_layers=range(6))
    last = model.exit_logits(x[5]).argmax(-1).flatten()
    for n, E in enumerate(EXITS):
        assert torch.equal(trace.states[n], x[E - 1].flatten(0, 1))
        probabilities = model.exit_logits(x[E - 1]).flatten(0, 1).softmax(-1)
        two = probabilities.topk(2).values
        assert torch.allclose(trace.gap[n], two[:, 0] - two[:, 1], atol=1e-5)
        assert torch.equal(trace.agrees[n], probabilities.argmax(-1) == last)


@pytest.mark.parametrize("form", FORMS)
def test_rows_leave_where_the_gate_says_and_as_they_would_alone(model, gate_file, form):
    path = gate_file(form)
    plain = decode(model, PROMPTS, Autoregressive()).tokens
    assert decode(model, PROMPTS, Gate(path=path, threshold=1.5)).tokens == plain
    asked = Gate(path=path, threshold=0.45)
    together = decode(model, PROMPTS, asked)
    assert together.tokens == [decode(model, [p], asked).tokens[0] for p in PROMPTS]
    assert together.counters.layers_per_token < 6
    calm = Calm(confidence="gate", gate=path, threshold=0.45)
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
