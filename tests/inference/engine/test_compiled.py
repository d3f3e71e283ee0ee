"""Compiled passes: what they attend to."""

import shutil

import pytest

from inference.engine import kv_cache
from inference.engine.compiled import compile_layers
from inference.strategies.registry import parse_strategy
from tests.inference.every_strategy import decode
from tests.models.families import build_random, shape


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for CPUs with c++")
@pytest.mark.parametrize("sliding_window", [None, 24])
def test_windows_that_are_split_give_the_same_tokens(monkeypatch, sliding_window):
    model = build_random(shape(sliding_window=sliding_window)).eval().requires_grad_(False)
    prompts = [[*range(1, 40)], [3, 5]]
    strategy = parse_strategy("self_speculative:E=2:d=3")
    options = {"max_new_tokens": 12, "batch_size": 2}
    plain = decode(model, prompts, strategy, **options).tokens
    split = []
    monkeypatch.setattr(kv_cache, "splits_slots", lambda slots, window: split.append(1) or True)
    compile_layers(model)
    assert decode(model, prompts, strategy, **options).tokens == plain
    assert split
