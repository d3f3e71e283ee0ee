"""Tokens exit where a slow form does, and the layers they left out run later, exactly."""

from dataclasses import replace

import pytest
import torch

from inference.engine.sampling import Sampling
from inference.strategies import free
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.free import Free
from inference.strategies.registry import parse_strategy
from models.rope import apply_rope
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.strategies.test_beta_mixture import slow_chance, slow_fit
from tests.inference.strategies.test_self_speculative import excess

L = 6


@pytest.fixture(scope="module")
def model():
    return make_model(L)


def slow_form(model, prompt, count, rule):
    """Run everything for every new token, and check the exits in turn."""
    tokens, depths, observed, threshold = list(prompt), [], [], rule.threshold
    for t in range(count):
        if rule.adapt and t % 16 == 0 and t >= 32:
            threshold = slow_threshold(observed, t - 16, rule, threshold)
        h = model.embed(torch.tensor([tokens]))
        _, exits = model.run_layers(h, 0, L, exit_layers=range(L))
        full = model.exit_logits(exits[L - 1][0, -1])
        for E in (*rule.exits, L):
            logits = model.exit_logits(exits[E - 1][0, -1], E)
            top = logits.softmax(-1).sort(descending=True).values
            confidence = top[0] - top[1] if rule.confidence == "gap" else top[0]
            if E < L:
                observed.append((t, float(confidence), bool(logits.argmax() == full.argmax())))
            if E == L or confidence >= threshold:
                break
        depth, token = E, int(logits.argmax())
        if rule.rollback == "threshold" and E < L:
            surprise = -full.log_softmax(-1)[token]
            if surprise > rule.rollback_threshold:
                depth, token = L, int(full.argmax())
        tokens.append(token)
        depths.append(depth)
    return tokens[len(prompt) :], depths


def slow_threshold(observed, end, rule, threshold):
    """Fit to (token, confidence, right) of all exits, of the last 256 tokens before `end`."""
    known = [(c, y) for token, c, y in observed if end - 256 <= token < end]
    if min(sum(y for _, y in known), sum(not y for _, y in known)) < 4:
        return threshold
    mixture = slow_fit(*zip(*known, strict=True))
    bad = [i for i in range(1, 100) if not slow_chance(mixture, i / 100) > rule.zeta]
    return (max(bad, default=0) + 1) / 100


RULES = [
    Free(exits=(2,), threshold=0.1),
    Free(exits=(2,), threshold=0.1, max_pending=2),
    Free(exits=(1,), threshold=0.0, max_pending=3),
    Free(exits=(1, 3, 4), threshold=0.12),
    Free(exits=(2, 4), threshold=0.16, confidence="maxprob", max_pending=4),
    Free(exits=(2,), threshold=0.1, rollback="threshold", rollback_threshold=2.5),
    Free(exits=(1, 3), threshold=0.1, rollback="threshold", rollback_threshold=2.0),
    Free(exits=(2,), threshold=0.1, adapt=True, zeta=0.5, max_pending=5),
    Free(exits=(1, 3), threshold=0.3, adapt=True, zeta=0.3, rollback="threshold"),
]


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_tokens_and_depths_are_those_of_the_slow_form(model, rule):
    count = 70 if rule.adapt else 20
    expected = [slow_form(model, prompt, count, rule) for prompt in PROMPTS]
    depths = sorted(depth for _, row in expected for depth in row)
    for options in ({}, {"batch_size": 2}, {"batch_size": 1}, {"async_readback": True}):
        found = decode(model, PROMPTS, rule, max_new_tokens=count, **options)
        assert found.tokens == [tokens for tokens, _ in expected]
        assert sorted(found.counters.depths.elements()) == depths
        assert found.counters.drafted <= (rule.max_pending - 1) * found.counters.rounds
    assert len(set(depths)) > 1 or rule.threshold == 0.0
    if rule.adapt:
        assert f"{found.counters.thresholds.total()} times" in rule.remark(found.counters)
        few = decode(model, PROMPTS, rule, max_new_tokens=32).counters
        assert "stayed at" in rule.remark(few)
        assert "after 32 new tokens" in rule.remark(few)
        fixed = decode(
            model, PROMPTS, replace(rule, adapt=False, zeta=Free.zeta), max_new_tokens=count
        )
        assert sorted(fixed.counters.depths.elements()) != depths


@pytest.mark.parametrize("rollback", ["off", "threshold"])
@pytest.mark.parametrize("exits", [(2,), (1, 3)])
def test_the_seed_decides_what_is_sampled_while_the_threshold_moves(model, exits, rollback):
    rule = Free(exits=exits, threshold=0.05, adapt=True, zeta=0.5, max_pending=5, rollback=rollback)

    def sampled(seed, rule=rule):
        options = {"sampling": Sampling(temperature=0.8), "seed": seed, "max_new_tokens": 60}
        generation = decode(model, PROMPTS, rule, **options)
        assert [len(row) for row in generation.tokens] == [60] * 4
        return generation.tokens

    found = sampled(1)
    assert sampled(1) == found
    assert sampled(2) != found
    assert sampled(1, replace(rule, adapt=False, zeta=Free.zeta)) != found, (
        "the threshold was to move"
    )


@pytest.mark.parametrize("exits", [(1,), (3,), (1, 4), (2, 3, 5)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.1])
@pytest.mark.parametrize("rows", [1, 8])
def test_exact_rollback_gives_plain_tokens(model, exits, threshold, rows):
    prompts = (PROMPTS * 2)[:rows]
    plain = decode(model, prompts, Autoregressive()).tokens
    rule = Free(exits=exits, threshold=threshold, max_pending=5, rollback="exact")
    for options in ({}, {"batch_size": 3}, {"async_readback": True}):
        assert decode(model, prompts, rule, **options).tokens == plain
    assert decode(model, prompts, replace(rule, adapt=True)).tokens == plain
    if threshold > 1:
        assert decode(model, prompts, Free(exits=exits, threshold=1.1)).tokens == plain


@pytest.mark.parametrize("exits", ["1", "1+2"])
@pytest.mark.parametrize("rollback", ["exact", "off"])
def test_exact_rollback_keeps_the_distribution(biased_model, exits, rollback):
    name = f"free:exits={exits}:threshold=0.2:rollback={rollback}"
    found = excess(biased_model, Sampling(temperature=1.0), E=None, d=None, name=name)
    assert found < 4 if rollback == "exact" else found > 20


def test_exact_rollback_keeps_the_distribution_while_the_threshold_moves(
    biased_model,
    monkeypatch,
):
    # Three new tokens are too few to fit anything to: thresholds drawn anew stand in for it.
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(
        free.RowThresholds,
        "of_token",
        lambda self, i: torch.rand(len(self._new), generator=generator) / 2,
    )
    name = "free:exits=1+2:adapt=true:rollback=exact"
    assert excess(biased_model, Sampling(temperature=1.0), E=None, d=None, name=name) < 4


def test_the_last_layers_own_tokens_are_not_replaced(biased_model):
    name = "free:exits=1:threshold=1.1:rollback=threshold:rollback_threshold=1.0"
    assert excess(biased_model, Sampling(temperature=1.0), E=None, d=None, name=name) < 4


def test_the_statistic_catches_greedy_drafts(biased_model, monkeypatch):
    monkeypatch.setattr(free, "sample", lambda weights, generator: weights.argmax(-1))
    name = "free:exits=1:threshold=0.2:rollback=exact"
    assert excess(biased_model, Sampling(temperature=1.0), E=None, d=None, name=name) > 20


@pytest.mark.parametrize("exits", [(2,), (1, 3, 4)])
def test_after_a_round_keys_and_values_are_those_of_a_full_forward(model, exits):
    from inference.engine.generation import Generation

    rule = Free(exits=exits, threshold=0.1, max_pending=6)
    generation = Generation(model, PROMPTS, rule, max_new_tokens=30)
    for _ in range(3):
        next(generation)
    for row, prompt in enumerate(PROMPTS):
        ids = prompt + generation.tokens[row]
        tokens = torch.tensor([ids[:-1]])
        seq = tokens.shape[1]
        h = model.embed(tokens)
        _, out = model.run_layers(h, 0, L, exit_layers=range(L))
        cos, sin = model.rope_cos[:seq], model.rope_sin[:seq]
        for l, x in enumerate([h, *(out[l] for l in range(L - 1))]):
            attention = model.block(l).attention
            normed = model.block(l).attention_norm(x)
            cache, close = generation._state.cache, {"atol": 1e-5, "rtol": 0}
            k = apply_rope(attention.split(attention.wk(normed)), cos, sin)[0]
            torch.testing.assert_close(cache.keys[l][row, :, :seq], k, **close)
            v = attention.split(attention.wv(normed))[0]
            torch.testing.assert_close(cache.values[l][row, :, :seq], v, **close)


WORKS = [
    Free(exits=(1, 3), threshold=0.1),
    Free(exits=(2,), threshold=0.1, rollback="threshold", adapt=True),
    Free(exits=(2,), threshold=1.1, rollback="exact", adapt=True),
]


@pytest.mark.parametrize("rule", WORKS, ids=range(len(WORKS)))
def test_work_is_what_hooks_count(model, rule):
    counted = {"layers": 0, "heads": 0}

    def count(key):
        def hook(module, args, output):
            counted[key] += output.shape[0] * output.shape[1]

        return hook

    hooks = [block.register_forward_hook(count("layers")) for block in model.layers.values()]
    hooks.append(model.norm.register_forward_hook(count("heads")))
    counters = decode(model, PROMPTS[:1], rule).counters
    for hook in hooks:
        hook.remove()
    assert counters.token_layers + counters.prompt_token_layers == counted["layers"]
    if rule.rollback == "off":
        assert counters.token_layers == L * 20, "every token runs every layer, sooner or later"
    assert counters.head_evaluations == counted["heads"]
    if rule.threshold > 1:
        assert counters.head_evaluations == 2 * 20, "one at the exit, one at the last layer"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Free(exits=(6,)), "exits: 6, free needs ascending layers from 1 to 5"),
        (Free(exits=(3, 2)), r"exits: 3\+2, free needs"),
        (Free(exits=()), "exits: none"),
        (Free(threshold=-1.0, max_pending=0), "threshold: -1.0.*; max_pending: 0"),
        (Free(zeta=1.0), "zeta: 1.0, give a number between"),
        (Free(rollback_threshold=-1.0), "rollback_threshold: -1.0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, rule)


def test_no_more_is_kept_than_rows_can_have(model):
    rule = Free(exits=(2,), threshold=0.3, adapt=True)
    plain = decode(model, PROMPTS, replace(rule, max_pending=28)).tokens
    assert decode(model, PROMPTS, replace(rule, max_pending=10**11)).tokens == plain


def test_without_an_exit_all_is_plain_decoding():
    one = make_model(1)
    plain = decode(one, PROMPTS, Autoregressive()).tokens
    for text in ("free", "free:adapt=true", "free:rollback=exact", "free:rollback=threshold"):
        found = decode(one, PROMPTS, parse_strategy(text), batch_size=2)
        assert found.tokens == plain
    with pytest.raises(ValueError, match="exits: this model has 1 layer and no exit before it"):
        decode(one, PROMPTS, Free(exits=(1,)))
    for name in ("self_speculative", "dynamic"):
        with pytest.raises(ValueError, match=f"strategy: {name} needs 2 layers"):
            decode(one, PROMPTS, parse_strategy(name))
