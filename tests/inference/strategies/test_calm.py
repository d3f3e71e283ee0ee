"""CALM's threshold is the paper's, and settings that do not fit are refused."""

import math

import pytest
import torch

from inference.strategies.calm import Calm
from inference.strategies.confidence import softmax_gap
from inference.strategies.row_exits import ExitObservation
from tests.inference.every_strategy import PROMPTS, decode, make_model


@pytest.fixture(scope="module")
def model():
    return make_model(6)


def test_thresholds_and_gaps_worked_by_hand():
    rule = Calm(threshold=0.2, tau=4.0, length=100)
    t = torch.tensor([0, 25, 10000])
    expected = torch.tensor([0.28, 0.18 + 0.1 * math.exp(-1), 0.18])
    torch.testing.assert_close(rule.threshold_at(t), expected)
    assert Calm(threshold=1.0, tau=0.0).threshold_at(t).tolist() == [1.0] * 3
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert softmax_gap(logits).item() == pytest.approx(0.2)
    sure = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])  # gaps of exactly 1 and 0
    exit_ = ExitObservation(1, sure, sure, lambda: sure, torch.zeros(2, dtype=torch.int64))
    assert Calm(threshold=1.0).exiting(exit_).tolist() == [True, False]
    assert Calm(threshold=0.0).exiting(exit_).tolist() == [True, True]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Calm(first=0), "first: 0, give 1 to 6 layers"),
        (Calm(first=7, interval=0), "first: 7, .*; interval: 0, give at least 1"),
        (Calm(threshold=-0.1), "threshold: -0.1"),
        (Calm(tau=-1.0, length=0), "tau: -1.0.*; length: 0"),
        (Calm(tau=math.inf), "tau: inf, give a finite number"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, rule)
