"""Layers left out for every token are those of the rule, and no token reads them."""

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
    assert Unified(speedup=8.0).with_defaults(12).keep == (0, 11), (
        "the published rule divides by zero"
    )
    assert Pruned().with_defaults(6).keep == (0, 2, 4)
    assert Pruned(every=3).with_defaults(8).keep == (0, 1, 3, 4, 6, 7)
    gaps = torch.tensor(Unified(speedup=3.0).with_defaults(32).keep).diff()
    assert gaps.max() - gaps.min() <= 1, "the published rule leaves a hole of 6 layers"


def test_unified_equals_the_slow_form(model):
    rule = Unified(speedup=2.0).with_defaults(L)
    dropped = whole_layers(set(range(L)) - set(rule.keep))

    def slow(last):
        """Decode with prompts up to their `last` token from the end in all layers."""
        return [
            slow_greedy(model, p, 12, lambda i, n: NOTHING if i < n - last else dropped)
            for p in PROMPTS
        ]

    expected = slow(0)
    assert expected not in (slow(1), slow(100))
    for options in ({}, {"batch_size": 2}, {"batch_size": 1}, {"async_readback": True}):
        found = decode(model, PROMPTS, rule, max_new_tokens=12, **options)
        assert found.tokens == expected
    stop = expected[1][4]
    ends = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    refilled = decode(model, PROMPTS, rule, max_new_tokens=12, stop_tokens=[stop], batch_size=2)
    assert refilled.tokens == ends, "prompts were to come while other rows are in their middle"
    plain = decode(model, PROMPTS, Autoregressive(), max_new_tokens=1).tokens
    assert [row[:1] for row in expected] == plain, "the first new token is the full model's"
    alone = decode(model, PROMPTS[:1], rule, max_new_tokens=12).counters
    assert alone.token_layers == L + 11 * 3


def test_a_speedup_that_no_number_of_layers_gives_is_reported(model):
    for speedup, remark in (
        (4.0, "speedup: 4, 3 is reached, with 2 of 6 layers"),
        (2.2, "speedup: 2.2, 2 is reached, with 3 of 6 layers"),
        (3.0, ""),
    ):
        for rule in (Unified(speedup=speedup), Unified(speedup=speedup).with_defaults(L)):
            assert rule.remark(decode(model, PROMPTS, rule, max_new_tokens=3).counters) == remark
    rule = Unified(keep=(0, 5))
    assert rule.remark(decode(model, PROMPTS, rule, max_new_tokens=3).counters) == ""


@pytest.mark.parametrize("keep", [(0, 2, 4), (0, 5), (1, 2, 3)])
def test_pruned_equals_a_model_without_the_other_layers(model, keep):
    dropped = whole_layers(set(range(L)) - set(keep))
    expected = [slow_greedy(model, p, 12, lambda position, n: dropped) for p in PROMPTS]
    assert decode(model, PROMPTS, Pruned(keep=keep), max_new_tokens=12).tokens == expected


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
        (Unified(speedup=8.0), "speedup: 8.0, unified keeps 2 of .* 6 layers .*, give at most 3"),
        (Unified(speedup=float("inf")), "speedup: inf, unified keeps 2 of .*, give at most 3"),
        (Unified(keep=(0, 6)), r"keep: 0\+6, unified needs layers from 0 to 5"),
        (Pruned(every=1), "every: 1, pruned needs at least 2"),
        (Pruned(every=7), "every: 7, leaves out none of 6 layers, give 2 to 6"),
        (Pruned(keep=()), "keep: none, pruned needs layers"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, rule)
