"""Fixed rules leave out the layers they say, for the tokens they say, and read no others."""

from collections import Counter

import pytest
import torch

from inference.engine.generation import Generation
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.pruned import Pruned
from inference.strategies.skipdecode import SkipDecode
from inference.strategies.unified import Unified
from models.llama import NOTHING, whole_layers
from models.token_depth import evenly_spaced
from tests.inference.every_strategy import PROMPTS, decode, make_model, slow_greedy

L = 6


@pytest.fixture(scope="module")
def model():
    return make_model(L)


def test_layers_kept_worked_by_hand():
    assert evenly_spaced(8, 4) == (0, 2, 5, 7)
    assert Unified(speedup=2.0).with_defaults(32).keep == evenly_spaced(32, 16)
    assert Unified(speedup=5.0).with_defaults(30).keep == (0, 6, 12, 17, 23, 29)
    assert Unified(speedup=10.0).with_defaults(12).keep == (0, 11), (
        "the published rule divides by zero"
    )
    assert Pruned().with_defaults(6).keep == (0, 2, 4)
    assert Pruned(every=3).with_defaults(8).keep == (0, 1, 3, 4, 6, 7)
    gaps = torch.tensor(Unified(speedup=3.0).with_defaults(32).keep).diff()
    assert gaps.max() - gaps.min() <= 1, "the published rule leaves a hole of 6 layers"


def test_budgets_worked_by_hand():
    rule = SkipDecode(warmup=1, max_layers=6, min_layers=2, length=8).with_defaults(8)
    places = torch.tensor([-1, 0, 1, 2, 4, 6, 8, 100])
    assert rule.budget.at(places).tolist() == [6, 6, 6, 5, 4, 3, 2, 2]  # 5.5 rounds to even
    assert rule.skipped(6, 8) == whole_layers({1, 2})
    assert rule.skipped(2, 8) == whole_layers({1, 2, 3, 4, 5, 6})


def test_unified_equals_the_slow_form(model):
    rule = Unified(speedup=2.0).with_defaults(L)
    dropped = whole_layers(set(range(L)) - set(rule.keep))
    # Prompt tokens but the last have keys in every layer, which nobody reads in those dropped.
    expected = [slow_greedy(model, p, 12, lambda place, n: dropped) for p in PROMPTS]
    full_prompt = [
        slow_greedy(model, p, 12, lambda place, n: NOTHING if place < n - 1 else dropped)
        for p in PROMPTS
    ]
    assert decode(model, PROMPTS, rule, max_new_tokens=12).tokens == full_prompt
    assert full_prompt != expected


@pytest.mark.parametrize("keep", [(0, 2, 4), (0, 5), (1, 2, 3)])
def test_pruned_equals_a_model_without_the_other_layers(model, keep):
    dropped = whole_layers(set(range(L)) - set(keep))
    expected = [slow_greedy(model, p, 12, lambda place, n: dropped) for p in PROMPTS]
    assert decode(model, PROMPTS, Pruned(keep=keep), max_new_tokens=12).tokens == expected


@pytest.mark.parametrize("length", [1, 3, 10])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_skipdecode_equals_the_slow_form(model, warmup, length):
    rule = SkipDecode(warmup=warmup, max_layers=5, min_layers=2, length=length).with_defaults(L)

    def parts(place, prompt_length):
        budget = int(rule.budget.at(torch.tensor(place - prompt_length)))
        return rule.skipped(budget, L)

    expected = [slow_greedy(model, p, 12, parts) for p in PROMPTS]
    # Rows of different lengths are at different places of the fall when rows are refilled.
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


def test_everything_kept_is_plain_decoding(model):
    plain = decode(model, PROMPTS, Autoregressive()).tokens
    whole = tuple(range(L))
    for rule in (Unified(speedup=1.0), Pruned(keep=whole), SkipDecode(min_layers=L)):
        assert decode(model, PROMPTS, rule).tokens == plain


RULES = [Unified(), Pruned(), SkipDecode(max_layers=4, min_layers=2, length=5)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_slot_nobody_wrote_is_read(model, rule):
    clean = decode(model, PROMPTS[:1], rule).tokens
    generation = Generation(model, PROMPTS[:1], rule, max_new_tokens=20)
    for buffer in generation._state.cache.keys + generation._state.cache.values:
        buffer.fill_(torch.nan)
    assert generation.finish().tokens == clean


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Unified(speedup=0.5), "speedup: 0.5, unified needs at least 1"),
        (Unified(speedup=float("nan")), "speedup: nan, unified needs at least 1"),
        (Unified(keep=(0, 6)), r"keep: 0\+6, unified needs layers from 0 to 5"),
        (Pruned(every=1), "every: 1, pruned needs at least 2"),
        (Pruned(keep=()), "keep: none, pruned needs layers"),
        (SkipDecode(max_layers=7), "max_layers: 7, skipdecode needs 1 to 6"),
        (SkipDecode(min_layers=0), "min_layers: 0, .*; warmup: 1, skipdecode needs 0 to"),
        (SkipDecode(length=0), "length: 0, skipdecode needs at least 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, rule)
