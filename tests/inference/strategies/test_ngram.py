"""Lookups are what a search by hand finds."""

import random
import time

import pytest
import torch

from inference.strategies.ngram import look_up


def lookup(row, longest, d):
    history = torch.tensor([[*row, 0, 0, 0]])
    drafts, found = look_up(history, torch.tensor([len(row) - 1]), longest, d)
    return drafts[0].tolist() if found else None


def by_hand(row, longest, d):
    for n in range(longest, 0 if longest == 1 else 1, -1):
        last = row[-n:]
        for end in range(len(row) - 2, n - 2, -1):
            if len(last) == n and row[end - n + 1 : end + 1] == last:
                period = row[end + 1 :]
                return [period[i % len(period)] for i in range(d)]
    return None


@pytest.mark.parametrize(
    ("row", "longest", "expected"),
    [
        ([5, 6, 7, 8, 5, 6], 2, [7, 8, 5, 6]),
        ([5, 6, 7, 5, 6, 9, 5, 6], 2, [9, 5, 6, 9]),
        ([1, 5, 6, 7, 2, 5, 6, 9, 1, 5, 6], 3, [7, 2, 5, 6]),
        ([4, 4, 4], 2, [4, 4, 4, 4]),
        ([1, 2, 3], 3, None),
        ([1, 2, 1], 2, None),
        ([1, 2, 1], 1, [2, 1, 2, 1]),
        ([7], 3, None),
    ],
)
def test_worked_by_hand(row, longest, expected):
    assert lookup(row, longest, 4) == by_hand(row, longest, 4) == expected


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_ragged_rows_are_searched_alone(longest):
    draw = random.Random(longest)
    rows = [[draw.randrange(4) for _ in range(draw.randrange(1, 30))] for _ in range(60)]
    history = torch.full((60, 31), 3)  # what lies behind a row's end must not matter
    for i, row in enumerate(rows):
        history[i, : len(row)] = torch.tensor(row)
    positions = torch.tensor([len(row) - 1 for row in rows])
    drafts, found = look_up(history, positions, longest, 5)
    expected = [by_hand(row, longest, 5) for row in rows]
    assert found.tolist() == [e is not None for e in expected]
    assert 0 < found.sum() < 60
    for i in found.nonzero().flatten().tolist():
        assert drafts[i].tolist() == expected[i]


def test_no_more_is_compared_than_a_row_has():
    history = torch.tensor([[5, 6, 7, 5, 6, 0]])
    begun = time.monotonic()
    drafts, found = look_up(history, torch.tensor([4]), 10**9, 2)
    assert time.monotonic() - begun < 10, "a billion steps take hours"
    assert found.all()
    assert drafts.tolist() == [[7, 5]]
    assert not look_up(torch.tensor([[5, 0]]), torch.tensor([0]), 10**9, 2)[1].any()
