"""Metrics are read one step late, and name what was not finite and where."""

import math

import pytest
import torch

from train.loop.step_metrics import DeferredReader, StepResult, StepTotals


def totals(**changes):
    """Return the totals of three exits, the second off, with some of them changed."""
    values = {
        "J": 0.5,
        "exit_sums": [8.0, 0.0, 12.0],
        "exit_tokens": [4.0, 0.0, 4.0],
        "density": 0.75,
        "grad_norm": 2.5,
        "num_stops": 0.0,
    }
    made = StepTotals.zeros(3, torch.device("cpu"))
    for name, value in (values | changes).items():
        getattr(made, name).copy_(torch.tensor(value))
    return made


def result(**changes):
    return StepResult(totals(**changes), totals(**changes))


def read(pushed):
    reader = DeferredReader()
    reader.push(0, pushed)
    [metrics] = reader.drain()
    return metrics


def test_totals_are_views_of_one_tensor_that_share_no_number():
    made = totals()
    assert made.packed.tolist() == [0.5, 8.0, 0.0, 12.0, 4.0, 0.0, 4.0, 0.75, 2.5, 0.0]
    again = StepTotals(made.packed)
    again.J += 1.0
    assert made.J.item() == 1.5
    assert again.exit_tokens.tolist() == [4.0, 0.0, 4.0]


def test_metrics_are_handed_out_when_the_next_step_is_pushed_or_on_demand():
    reader = DeferredReader()
    assert reader.push(4, result()) == []
    [first] = reader.push(5, result())
    assert first.t == 4
    [second] = reader.drain()
    assert second.t == 5
    assert reader.drain() == []


def test_losses_are_means_over_the_tokens_of_the_exits_that_were_on():
    metrics = read(result())
    assert metrics.J == 0.5
    assert metrics.exit_losses == {0: 2.0, 2: 3.0}
    assert metrics.density == 0.75
    assert metrics.grad_norm == 2.5
    assert not metrics.stop
    assert metrics.finite
    assert metrics.local_bad_losses() == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"exit_sums": [math.inf, 0.0, math.nan]},
            [
                "the loss of the exit after 1 layer is inf",
                "the loss of the exit after 3 layers is nan",
            ],
        ),
        ({"grad_norm": math.nan}, []),
    ],
)
def test_what_is_not_finite_is_named_on_the_rank_where_it_is(changes, found):
    metrics = read(result(**changes))
    assert not metrics.finite
    assert metrics.local_bad_losses() == found


def test_a_stop_requested_on_any_rank_is_read():
    assert read(StepResult(totals(num_stops=1.0), totals())).stop
