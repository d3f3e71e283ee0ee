"""Later tokens run the layers their budget leaves, and read no others."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from inference.strategies.skipdecode import SkipDecode
from models.llama import whole_layers
from models.token_depth import FallingBudget
from tests.inference.every_strategy import PROMPTS, decode, make_model, slow_greedy

L = 6


@pytest.fixture(scope="module")
def model():
    return make_model(L)


def test_budgets_worked_by_hand():
    rule = SkipDecode(warmup=1, max_layers=6, min_layers=2, length=8).with_defaults(8)
    steps = torch.tensor([*range(-1, 9), 100])
    assert rule.budget.at(steps).tolist() == [6, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2]  # 5.5, 4.5, ... up
    assert rule.skipped(6, 8) == whole_layers({1, 2})
    assert rule.skipped(2, 8) == whole_layers({1, 2, 3, 4, 5, 6})


def test_steps_are_even_as_exact_halves_round_up():
    for span in (*range(8), 77):
        for length in (1, 2, 6, 7, 14, 22, 49, 128, 2**62):
            rule = FallingBudget(warmup=0, most=80, least=80 - span, length=length)
            n = [*range(-1, 140)]
            exact = [80 - span * min(Fraction(max(i, 0), length), 1) for i in n]
            expected = [math.floor(e + Fraction(1, 2)) for e in exact]
            assert rule.at(torch.tensor(n)).tolist() == expected


@pytest.mark.parametrize("length", [1, 3, 10])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_skipdecode_equals_the_slow_form(model, warmup, length):
    rule = SkipDecode(warmup=warmup, max_layers=5, min_layers=2, length=length).with_defaults(L)

    def parts(position, prompt_length):
        budget = int(rule.budget.at(torch.tensor(position - prompt_length)))
        return rule.skipped(budget, L)

    expected = [slow_greedy(model, p, 12, parts) for p in PROMPTS]
    # Rows of different lengths are at different points of the fall when rows are refilled.
    for batch_size in (4, 2):
        found = decode(model, PROMPTS, rule, max_new_tokens=12, batch_size=batch_size)
        assert found.tokens == expected
    alone = decode(model, PROMPTS[:1], rule, max_new_tokens=12).counters
    budgets = [int(rule.budget.at(torch.tensor(n))) for n in range(-1, 11)]
    assert alone.token_layers == sum(budgets)
    assert alone.depths.total() == 12
    assert sum(depth * n for depth, n in alone.depths.items()) == sum(budgets)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_rows_with_other_budgets_in_one_pass_are_what_they_are_alone(model, batch_size):
    rule = SkipDecode(warmup=1, max_layers=6, min_layers=2, length=8)
    prompts = [*PROMPTS, [11], [5, 3, 9, 1], [17, 18, 19]]
    whole = [decode(model, [prompt], rule).tokens[0] for prompt in prompts]
    stops = [whole[0][2], whole[3][4], whole[4][6]]
    alone = [decode(model, [p], rule, stop_tokens=stops).counters for p in prompts]
    assert len({counters.tokens for counters in alone}) > 2, "rows were to be refilled at odd times"
    rows = [decode(model, [p], rule, stop_tokens=stops).tokens[0] for p in prompts]
    for async_readback in (False, True):
        options = {"stop_tokens": stops, "batch_size": batch_size, "async_readback": async_readback}
        together = decode(model, prompts, rule, **options)
        assert together.tokens == rows
        assert together.counters.depths == sum((c.depths for c in alone), Counter())
    assert together.counters.token_layers > sum(counters.token_layers for counters in alone)


def test_a_row_that_is_done_takes_no_layers(model):
    rule = SkipDecode(warmup=1, max_layers=6, min_layers=2, length=8)
    prompts = [[3, 4, 5], [7, 8, 9]]
    first, second = (decode(model, [prompt], rule).tokens[0] for prompt in prompts)
    stop = next(token for token in second[:4] if token not in first)
    counters = decode(model, prompts, rule, stop_tokens=[stop]).counters
    assert counters.token_layers == 2 * decode(model, prompts[:1], rule).counters.token_layers


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SkipDecode(max_layers=7), "max_layers: 7, skipdecode needs 1 to 6"),
        (SkipDecode(min_layers=0), "min_layers: 0, .*; warmup: 1, skipdecode needs 0 to"),
        (SkipDecode(length=0), "length: 0, skipdecode needs at least 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, rule)
