"""Mixtures are found again, and rows learn from their own verified tokens alone."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from inference.engine.batch import Batch
from inference.engine.counters import Counters
from inference.strategies.beta_mixture import BetaMixture, RowThresholds, fit, fitted_threshold


def slow_fit(confidences, rights):
    """Fit one row in plain Python; return [(weight, a, b, right)] of the two groups."""
    c = [min(max(x, 1e-3), 1 - 1e-3) for x in confidences]
    r = [(0.9, 0.1) if y else (0.1, 0.9) for y in rights]
    for step in range(26):
        groups = []
        for k in (0, 1):
            mass = max(sum(x[k] for x in r), 1e-3)
            m = sum(x[k] * v for x, v in zip(r, c, strict=True)) / mass
            m = min(max(m, 1e-3), 1 - 1e-3)
            s2 = sum(x[k] * (v - m) ** 2 for x, v in zip(r, c, strict=True)) / mass
            size = m * (1 - m) / min(max(s2, 1e-4), 0.9 * m * (1 - m)) - 1
            right = sum(x[k] for x, y in zip(r, rights, strict=True) if y) / mass
            groups.append([mass, m * size, (1 - m) * size, right])
        total = groups[0][0] + groups[1][0]
        groups = [(mass / total, a, b, right) for mass, a, b, right in groups]
        if step == 25:
            return groups
        r = []
        for v, y in zip(c, rights, strict=True):
            p = []
            for group in groups:
                right = min(max(group[3], 1e-3), 1 - 1e-3)
                p.append(density(group, v) * (right if y else 1 - right))
            r.append((p[0] / sum(p), p[1] / sum(p)))
    raise AssertionError


def density(group, c):
    weight, a, b, _ = group
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return weight * math.exp(scale + (a - 1) * math.log(c) + (b - 1) * math.log(1 - c))


def slow_chance(groups, c):
    p = [density(group, c) for group in groups]
    return sum(x * group[3] for x, group in zip(p, groups, strict=True)) / sum(p)


def draws(groups, count, seed):
    """Return count draws of (confidence, right) from a mixture."""
    draw = random.Random(seed)
    kinds = draw.choices(groups, [group[0] for group in groups], k=count)
    drawn = [(draw.betavariate(a, b), draw.random() < right) for _, a, b, right in kinds]
    c, y = zip(*drawn, strict=True)
    return torch.tensor(c), torch.tensor(y)


SURE = [(0.7, 8.0, 2.0, 0.95), (0.3, 2.0, 5.0, 0.15)]
UNSURE = [(0.2, 8.0, 2.0, 0.95), (0.8, 2.0, 5.0, 0.15)]


@pytest.mark.parametrize("truth", [SURE, UNSURE], ids=["sure", "unsure"])
def test_the_chance_of_a_mixture_is_found_again(truth):
    c, y = draws(truth, 8000, seed=0)
    mixture = fit(c[None], y[None], torch.ones(1, 8000, dtype=torch.bool), iterations=200)
    grid = [i / 20 for i in range(1, 20)]
    found = mixture.chance_right(torch.tensor([grid]))[0].tolist()
    assert found == pytest.approx([slow_chance(truth, x) for x in grid], abs=0.03)
    assert mixture.weight[0].tolist() == pytest.approx([g[0] for g in truth], abs=0.02)


def test_weights_of_the_groups_move_the_threshold():
    found = []
    for truth in (SURE, UNSURE):
        c, y = draws(truth, 8000, seed=1)
        every = torch.ones(1, 8000, dtype=torch.bool)
        [threshold] = fitted_threshold(c[None], y[None], every, 0.6, torch.zeros(1)).tolist()
        crossing = min(x / 100 for x in range(1, 100) if slow_chance(truth, x / 100) > 0.6)
        assert threshold == pytest.approx(crossing, abs=0.04)
        found.append(threshold)
    assert found[0] + 0.1 < found[1]


def test_rows_of_any_length_are_fitted_as_the_slow_form_does():
    lengths = [9, 40, 23, 64]
    c, y, counts = torch.rand(4, 64), torch.rand(4, 64) < 0.5, torch.zeros(4, 64, dtype=torch.bool)
    for row, length in enumerate(lengths):
        c[row, :length], y[row, :length] = draws(SURE if row % 2 else UNSURE, length, seed=row)
        counts[row, :length] = True
    mixture = fit(c.double(), y, counts)
    for row, length in enumerate(lengths):
        groups = slow_fit(c[row, :length].tolist(), y[row, :length].tolist())
        for k in (0, 1):
            ours = [float(t[row, k]) for t in (mixture.weight, mixture.a, mixture.b, mixture.right)]
            assert ours == pytest.approx(groups[k], rel=1e-4)


def test_the_fit_is_as_likely_as_the_truth():
    c, y = draws(UNSURE, 3000, seed=2)
    every = torch.ones(1, 3000, dtype=torch.bool)

    def likelihood(mixture):
        chance = torch.where(y[None, :, None], mixture.right[:, None], 1 - mixture.right[:, None])
        return (mixture.joint(c[None]) + chance.log()).logsumexp(-1).mean()

    truth = BetaMixture(*(torch.tensor([v]) for v in zip(*UNSURE, strict=True)))
    first, some, many = (fit(c[None], y[None], every, iterations=i) for i in (0, 25, 200))
    assert likelihood(first) + 0.01 < likelihood(some) < likelihood(many)
    assert likelihood(many) > likelihood(truth) - 0.002


@pytest.mark.parametrize(
    ("confidence", "right"),
    [(torch.rand(50), torch.ones(50)), (torch.rand(50), torch.zeros(50)), (torch.rand(50), None)],
    ids=["all right", "all wrong", "too few"],
)
def test_a_threshold_stays_where_there_is_nothing_to_learn_from(confidence, right):
    y = torch.ones(50, dtype=torch.bool) if right is None else right.bool()
    if right is None:
        y[:3] = False
    every = torch.ones(1, 50, dtype=torch.bool)
    old = torch.tensor([0.77])
    assert torch.equal(fitted_threshold(confidence[None], y[None], every, 0.4, old), old)


def test_confidences_all_alike_give_no_nan():
    y = torch.arange(50)[None] % 2 == 0
    every = torch.ones(1, 50, dtype=torch.bool)
    for value in (0.0, 0.5, 1.0):
        c = torch.full((1, 50), value)
        assert 0.0 < fitted_threshold(c, y, every, 0.4, torch.zeros(1)).item() <= 1.0


def thresholds_of(stream, cuts, prompts=((0, 400),)):
    """Feed rounds that end at `cuts`; return the threshold of every new token, prompt by prompt."""
    batch = Batch.empty(1, 800, torch.device("cpu"))
    state = SimpleNamespace(
        batch=batch, sync_bool=bool, sync_list=torch.Tensor.tolist, counters=Counters()
    )
    state.batch.prompt_lengths.fill_(5)
    memory = RowThresholds(state, exits=1, first=0.5, zeta=0.6, longest_round=8)
    found = []
    for first, last in prompts:
        t, row = 0, []
        while t < last - first:
            count = min(cuts.choice((1, 2, 5, 8)), last - first - t)
            state.batch.positions.fill_(4 + t)
            memory.begin()
            row += [float(memory.of_token(i)) for i in range(count)]
            # What is drafted beyond the tokens that stay is forgotten.
            drafted = cuts.randrange(count, 9)
            part = [stream[(first + t + i) % len(stream)] for i in range(drafted)]
            part[count:] = [(0.123, True)] * (drafted - count)
            c, y = (torch.tensor(x)[None, :, None] for x in zip(*part, strict=True))
            memory.update(c, y, torch.ones_like(y))
            t += count
        found.append(row)
    return found


def test_thresholds_depend_on_a_rows_tokens_and_not_on_where_rounds_ended():
    c, y = draws(SURE, 300, seed=3)
    c2, y2 = draws(UNSURE, 400, seed=4)
    stream = [*zip((*c.tolist(), *c2.tolist()), (*y.tolist(), *y2.tolist()), strict=True)]
    [whole] = thresholds_of(stream, random.Random(0), [(0, 700)])
    for seed in (1, 2):
        assert thresholds_of(stream, random.Random(seed), [(0, 700)]) == [whole]
    assert set(whole[:32]) == {0.5}
    assert len(set(whole)) > 10
    # At most 256 tokens are remembered: what came before them is of no consequence.
    for t in (400, 699):
        end = (t // 16 - 1) * 16
        old = stream[end - 256 : end]
        known = torch.tensor([old])
        expected = fitted_threshold(
            known[..., 0],
            known[..., 1].bool(),
            torch.ones(1, 256, dtype=torch.bool),
            0.6,
            torch.zeros(1),
        )
        assert whole[t] == pytest.approx(expected.item())


def test_a_row_that_is_given_another_prompt_starts_over():
    c, y = draws(SURE, 400, seed=5)
    stream = [*zip(c.tolist(), y.tolist(), strict=True)]
    one, two = thresholds_of(stream, random.Random(0), [(0, 100), (100, 200)])
    assert [one] == thresholds_of(stream, random.Random(1), [(0, 100)])
    assert [two] == thresholds_of(stream, random.Random(2), [(100, 200)])
