"""Measures of exit rules against worked numbers and slow forms."""

import itertools
import math

import pytest
import torch

from inference.evaluation.rule_quality import (
    agreement_at,
    agreement_at_depth,
    area_under_roc,
    best_agreement,
    curve,
    depths_at,
)

EXITS = range(1, 4)


def test_area_is_the_share_of_pairs_in_order_ties_counting_half():
    scores = torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(0)) / 5
    labels = torch.rand(40, generator=torch.Generator().manual_seed(1)) > 0.6
    pairs = [
        (a > b).float() + 0.5 * (a == b).float()
        for a, b in itertools.product(scores[labels], scores[~labels])
    ]
    assert area_under_roc(scores, labels) == pytest.approx(torch.stack(pairs).mean().item())
    assert math.isnan(area_under_roc(scores, torch.ones(40, dtype=torch.bool)))


def test_tokens_exit_at_the_first_exit_that_is_sure():
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.5], [0.9, 0.6, 0.3, 0.4], [0.0, 0.9, 0.4, 0.9]])
    agrees = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 1]]).bool()
    depths = depths_at(scores, 0.5, EXITS, 4)
    assert depths.tolist() == [1, 2, 4, 1]
    assert agreement_at(depths, agrees, EXITS, 4) == pytest.approx(2 / 4)
    points = curve(scores, agrees, EXITS, 4)
    assert points[-1] == (4.0, 1.0)
    assert points[0][0] == 1.0
    assert agreement_at_depth([(1.0, 0.4), (3.0, 0.8)], 2.0) == pytest.approx(0.6)


def test_no_choice_of_exits_is_better_than_the_oracle():
    generator = torch.Generator().manual_seed(4)
    agrees = torch.rand(3, 4, generator=generator) > 0.5
    for total in range(4, 17):
        best = max(
            agreement_at(torch.tensor(depths), agrees, EXITS, 4)
            for depths in itertools.product((1, 2, 3, 4), repeat=4)
            if sum(depths) <= total
        )
        oracle = best_agreement(agrees, EXITS, 4, total / 4)
        assert best <= oracle + 1e-9
        assert oracle < best + 1 / 4  # only the last token is shared
