"""Every token is as likely to be chosen, whatever is beside it, and apart from layer dropout."""

import numpy as np
import pytest

from models.layer_dropout import uniform
from train.loop.exit_tokens import draw_tokens


def draw(fraction=0.25, seed=3, t=5, samples=(4, 9), seq=16):
    samples = np.array(samples)
    chosen = draw_tokens(fraction, seed=seed, t=t, samples=samples, seq=seq)
    return [(chosen[chosen // seq == b] % seq).tolist() for b in range(len(samples))]


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 4), (0.3, 5), (0.01, 1), (0.99, 16)])
def test_every_sequence_gives_equally_many(fraction, count):
    rows = draw(fraction, samples=range(5))
    assert [len(set(row)) for row in rows] == [count] * 5
    assert all(row == sorted(row) for row in rows)


def test_a_choice_hangs_on_seed_step_and_sample_and_nothing_else():
    [row] = draw(samples=[9])
    assert draw(samples=[1, 9, 2])[1] == row
    assert draw(samples=[9], t=6) != [row]
    assert draw(samples=[9], seed=4) != [row]
    assert draw(samples=[10]) != [row]


def test_every_position_is_as_likely():
    times = np.zeros(16)
    for t in range(200):
        for row in draw(t=t, samples=range(20)):
            times[row] += 1
    # Each is binomial(4000, 1/4): mean 1000, standard deviation 27.4.
    assert times.sum() == 4000 * 4
    assert np.abs(times - 1000).max() < 4.5 * 27.4


def test_the_draws_are_not_those_of_layer_dropout():
    dropped = uniform(3, 5, 16, np.array([4]))[:, 0].argsort()[:4]
    assert sorted(dropped.tolist()) != draw(samples=[4])[0]
