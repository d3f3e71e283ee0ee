"""A trace holds what a full forward finds."""

import pytest
import torch

from inference.fitting.traces import record
from tests.inference.every_strategy import make_model
from tests.inference.strategies.test_gate_classifiers import EXITS


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_a_trace_holds_states_gaps_and_agreement_of_the_exits(model):
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
