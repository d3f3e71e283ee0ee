"""Agreement is estimated from what the rounds show, and the best E and d follow."""

import pytest
import torch

from inference.engine.batch import Round
from inference.strategies.agreement import (
    Agreement,
    best_shape,
    count_agreed_drafts,
    count_agreed_leaves,
    count_agreed_lookups,
)
from inference.strategies.drafting import NgramDrafts


def test_agreement_less_its_standard_error_worked_by_hand():
    for agreed, tried, expected in (
        (80.0, 100.0, 0.8 - 0.04),
        (1.0, 2.0, 0.5 - 0.5 / 2**0.5),
        (10.0001, 10.0, 1.0),
        (0.01, 3.0, 0.0),
    ):
        found = Agreement(0.9, agreed=agreed, tried=tried).lower_bound()
        assert found == pytest.approx(expected)
    agreement = Agreement(0.5)
    agreement.add(2.0, 3.0)
    agreement.add(0.0, 4.0)
    assert (agreement.agreed, agreement.tried) == (0.25 + 1.0, 0.5 + 1.5 + 4.0)


def test_agreed_drafts_worked_by_hand():
    # Accepted whole, none, one of three, nothing drafted.
    result = Round(
        torch.zeros(4, 4), torch.tensor([3, 0, 1, 0]), drafted=torch.tensor([3, 3, 3, 0])
    )
    rows = torch.ones(4, dtype=torch.bool)
    assert count_agreed_drafts(result, rows).tolist() == [3 + 0 + 1 + 0, 3 + 1 + 2 + 0]
    rows[0] = False
    assert count_agreed_drafts(result, rows).tolist() == [1, 3]


def test_agreed_leaves_worked_by_hand():
    # The first leaf after one token, the second at once, none, accepted whole, ended before.
    accepted, leaf = torch.tensor([2, 1, 1, 3, 2]), torch.tensor([1, 2, 0, 0, 0])
    drafted = torch.tensor([3, 3, 3, 3, 2])
    result = Round(torch.zeros(5, 4), accepted, drafted=drafted, leaf=leaf)
    rows = torch.ones(5, dtype=torch.bool)
    # Own tokens: 1 of 2, 0 of 1, 1 of 2, 3 of 3, 2 of 2.
    assert count_agreed_drafts(result, rows).tolist() == [1 + 0 + 1 + 3 + 2, 2 + 1 + 2 + 3 + 2]
    assert count_agreed_leaves(result, rows, 3).tolist() == [[1, 3], [1, 2]]
    rows[0] = False
    assert count_agreed_leaves(result, rows, 3).tolist() == [[0, 2], [1, 2]]


def test_agreed_lookups_worked_by_hand():
    lookups = NgramDrafts(
        torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 2, 3]]),
        torch.tensor([True, True, True, True, False]),
        vocab_size=10,
        greedy=True,
    )
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    result = Round(tokens, torch.tensor([3, 2, 0, 3, 3]), torch.full((5,), 3))
    rows = torch.ones(5, dtype=torch.bool)
    # By row: 3 of 3, 2 of 3, then only the first token is known, then a wrong one, then no lookup.
    assert count_agreed_lookups(lookups, result, rows).tolist() == [3 + 2 + 1, 3 + 3 + 1 + 1]
    rows[1] = False
    assert count_agreed_lookups(lookups, result, rows).tolist() == [3 + 1, 3 + 1 + 1]
    plain = Round(tokens[:, :1], torch.zeros(5, dtype=torch.int64), torch.zeros(5))
    rows[1] = True
    assert count_agreed_lookups(lookups, plain, rows).tolist() == [3, 4]


def test_the_best_shape_worked_by_hand():
    # One exit, a = 0.8, c = 0.25: d = 1: 1.8/1.25 = 1.44; 2: 2.44/1.5 = 1.627; 3: 2.952/1.75 =
    # 1.687; 4: 3.3616/2 = 1.681.
    free = 0.0, 0.0
    one = {3: [0.8]}, {3: 0.25}, {3: 1.0}, free
    assert best_shape(*one, 10) == (3, 3, 1, pytest.approx(2.952 / 1.75))
    assert best_shape(*one, 2) == (3, 2, 1, pytest.approx(2.44 / 1.5))
    assert best_shape(*one, 0) == (3, 0, 1, 1.0)
    less_than_plain = best_shape({3: [0.2]}, *one[1:], 10)  # 1.2 / 1.25
    assert less_than_plain == (3, 0, 1, 1.0)
    costs = {1: 0.2, 2: 0.4, 4: 0.8}, dict.fromkeys((1, 2, 4), 1.0), free
    assert best_shape({1: [0.1], 2: [0.9], 4: [0.91]}, *costs, 2)[:3] == (2, 2, 1)
    dear = best_shape(*one[:2], {3: 3.0}, free, 4)
    assert dear.d == 0, "a dear verification pays for no draft"


def test_the_best_shape_with_leaves_worked_by_hand():
    agreement, rest = {3: [0.8, 0.5, 0.2]}, ({3: 0.25}, {3: 1.0})
    # A rejection is mended by the second choice in 0.5 of the cases, by one of the next two in 0.6:
    # d = 3: (2.952 + 0.488 * 0.6) / 1.75 = 1.854; 4: (3.3616 + 0.5904 * 0.6) / 2 = 1.858.
    free = best_shape(agreement, *rest, (0.0, 0.0), 10)
    assert free == (3, 4, 3, pytest.approx((3.3616 + 0.5904 * 0.6) / 2))
    # Having leaves for 0.1 and each for 0.02: d = 3: branch = 2: 3.196 / 1.91 = 1.673; 3: 1.647.
    assert best_shape(agreement, *rest, (0.1, 0.02), 3)[1:3] == (3, 1), "2.952 / 1.75 is more"
    # For 0.05 and 0.02: d = 2: (2.44 + 0.18) / 1.59 = 1.648; 3: 3.196 / 1.86 = 1.718; 4: 1.714.
    some = best_shape(agreement, *rest, (0.05, 0.02), 10)
    assert some == (3, 3, 2, pytest.approx((2.952 + 0.488 * 0.5) / 1.86))
