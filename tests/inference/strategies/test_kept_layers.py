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
    assert Unified(speedup=10.0).with_defaults(12).keep == (0, 11), (
        "the published rule divides by zero"
    )
    assert Pruned().with_defaults(6).keep == (0, 2, 4)
    assert Pruned(every=3).with_defaults(8).keep == (0, 1, 3, 4, 6, 7)
    gaps = torch.tensor(Unified(speedup=3.0).with_defaults(32).keep).diff()
    assert gaps.max() - gaps.min() <= 1, "the published rule leaves a hole of 6 layers"


def test_unified_equals_the_slow_form(model):
    rule = Unified(speedup=2.0).with_defaults(L)
    dropped = whole_layers(set(range(L)) - set(rule.keep))
    # Prompt tokens but the last have keys in every layer, which nobody reads in those dropped.
    expected = [slow_greedy(model, p, 12, lambda position, n: dropped) for p in PROMPTS]
    full_prompt = [
        slow_greedy(model, p, 12, lambda position, n: NOTHING if position < n - 1 else dropped)
        for p in PROMPTS
    ]
    assert decode(model, PROMPTS, rule, max_new_tokens=12).tokens == full_prompt
    assert full_prompt != expected


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
        (Unified(keep=(0, 6)), r"keep: 0\+6, unified needs layers from 0 to 5"),
        (Pruned(every=1), "every: 1, pruned needs at least 2"),
        (Pruned(keep=()), "keep: none, pruned needs layers"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, rule)
