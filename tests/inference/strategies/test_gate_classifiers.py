"""Scores of each form of classifier are those worked out token by token."""

import pytest
import torch

from inference.fitting.gate_training import (
    all_scores,
)
from inference.strategies.gate_classifiers import FORMS, new_gate

EXITS = range(1, 6)


def random_gate(form, exits=EXITS, dim=32, scale=0.5):
    generator = torch.Generator().manual_seed(1)
    gate = new_gate(form, exits, dim, hidden=7, generator=generator)
    for tensor in gate.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return gate


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_the_form(form):
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
