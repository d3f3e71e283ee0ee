"""Outcomes are read one step late, and say what was wrong where."""

import math

import pytest
import torch

from train.loop.step import StepResult
from train.loop.step_metrics import DeferredReader

# J, three exits' sums, their token counts, density, gradient norm, ranks that want to stop.
TOTALS = [0.5, 8.0, 0.0, 12.0, 4.0, 0.0, 4.0, 0.75, 2.5, 0.0]


def result(totals=TOTALS, local=TOTALS):
    return StepResult(torch.tensor(totals), torch.tensor(local))


def changed(**values):
    """Return totals with the entries i<number>=value replaced."""
    return [values.get(f"i{i}", value) for i, value in enumerate(TOTALS)]


def test_an_outcome_is_handed_out_when_the_next_step_is_pushed_or_on_demand():
    reader = DeferredReader()
    assert reader.push(4, result()) == []
    [first] = reader.push(5, result())
    assert first.t == 4
    [second] = reader.drain()
    assert second.t == 5
    assert reader.drain() == []


def test_losses_are_means_over_the_tokens_of_the_exits_that_were_on():
    reader = DeferredReader()
    reader.push(0, result())
    [outcome] = reader.drain()
    assert outcome.J == 0.5
    assert outcome.exit_losses == {0: 2.0, 2: 3.0}
    assert outcome.density == 0.75
    assert outcome.grad_norm == 2.5
    assert not outcome.stop
    assert outcome.finite
    assert outcome.bad_losses_here() == []


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (3, ["the loss of the exit after layer 2 is nan"]),
        (8, []),
    ],
)
def test_what_is_not_finite_is_named_on_the_rank_where_it_is(index, found):
    bad = changed(**{f"i{index}": math.nan})
    reader = DeferredReader()
    reader.push(0, result(totals=bad, local=bad))
    [outcome] = reader.drain()
    assert not outcome.finite
    assert outcome.bad_losses_here() == found


def test_a_wish_to_stop_of_any_rank_is_seen():
    reader = DeferredReader()
    reader.push(0, result(totals=changed(i9=1.0)))
    [outcome] = reader.drain()
    assert outcome.stop
