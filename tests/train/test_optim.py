"""The learning rate, against values worked by hand."""

import pytest

from train.optim import OptimConfig, lr


def rates(schedule, T=11, **changes):
    fields = dict(lr=1.0, warmup_steps=2, schedule=schedule, min_lr_ratio=0.2)
    config = OptimConfig(**(fields | changes))
    return [lr(config, t, T) for t in range(T)]


def test_linear():
    expected = [0.5, 1.0] + [1 - 0.8 * k / 9 for k in range(1, 10)]
    assert rates("linear") == pytest.approx(expected)


def test_cosine_is_at_the_mean_half_way():
    values = rates("cosine", T=12)
    assert values[:2] == [0.5, 1.0]
    assert values[6] == pytest.approx(0.6)  # halfway between steps 1 and 11
    assert values[11] == pytest.approx(0.2)


def test_warmup_stable_decay():
    values = rates("wsd", T=12, decay_fraction=0.25)
    assert values[1:9] == [1.0] * 8
    assert values[8:] == pytest.approx([1.0, 1 - 0.8 / 3, 1 - 1.6 / 3, 0.2])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_edges_are_defined(schedule):
    assert rates(schedule, T=2, warmup_steps=1)[0] == 1.0
    assert 0.2 <= rates(schedule, T=1, warmup_steps=0)[0] <= 1.0
    assert rates(schedule, T=3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


def test_problems_name_the_field():
    assert OptimConfig(lr=1e-3).problems() == []
    assert "optim.lr" in OptimConfig(lr=0.0).problems()[0]
