"""Losses of gates against slow forms, and fitted gates separate right from wrong."""

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
from inference.fitting.traces import Trace
from inference.strategies.gate_classifiers import STOPPING


def learnable(tokens=4000, dim=8):
    """States whose first number decides whether the exit is right."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, tokens, dim, generator=generator)
    agrees = states[..., 0] > torch.tensor([1.0, 0.0, -1.0])[:, None]
    return Trace(range(1, 4), states, torch.zeros(3, tokens), agrees)


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
def test_a_fitted_gate_separates_right_from_wrong(form):
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
