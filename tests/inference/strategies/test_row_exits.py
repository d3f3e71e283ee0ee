"""Rows exit where a slow form does, alone or in a batch, and their later keys are projected."""

import math

import pytest
import torch

from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.patience import Patience
from models.rope import apply_rope
from tests.inference.every_strategy import PROMPTS, decode, make_model

L = 6


@pytest.fixture(scope="module")
def model():
    return make_model(L)


def slow_form(model, prompt, count, exiting):
    """Decode one row token by token, with keys and values in plain lists.

    `exiting(E, h, states, logits, t)` returns whether a token exits after E layers, with the states
    x_0, ..., x_E and the logits after 1, ..., E layers.
    """
    config, tokens, depths = model.config, list(prompt), []
    keys, values = [[] for _ in range(L)], [[] for _ in range(L)]
    for position in range(len(prompt) + count - 1):
        h = model.embed(torch.tensor([[tokens[position]]]))
        cos, sin = model.rope_cos[None, None, [position]], model.rope_sin[None, None, [position]]
        states, depth, outputs = [h[0, 0]], None, []
        for l in range(L):
            block = model.block(l)
            x = block.attention_norm(h)
            q = apply_rope(block.attention.split(block.attention.wq(x)), cos, sin)
            keys[l].append(apply_rope(block.attention.split(block.attention.wk(x)), cos, sin))
            values[l].append(block.attention.split(block.attention.wv(x)))
            if depth is not None:
                continue
            k = torch.cat(keys[l], 2).repeat_interleave(config.n_heads // config.n_kv_heads, 1)
            v = torch.cat(values[l], 2).repeat_interleave(config.n_heads // config.n_kv_heads, 1)
            weights = (q @ k.transpose(-1, -2) / math.sqrt(config.head_width)).softmax(-1)
            h = h + block.attention.wo((weights @ v).transpose(1, 2).flatten(2))
            h = h + block.feed_forward(block.ffn_norm(h))
            outputs.append(model.exit_logits(h, l + 1)[0, 0])
            states.append(h[0, 0])
            t = position + 1 - len(prompt)
            if l == L - 1 or (t >= 0 and exiting(l + 1, h[0, 0], states, outputs, t)):
                depth = l + 1
        if position >= len(prompt) - 1:
            tokens.append(int(outputs[-1].argmax()))
            depths.append(depth)
    return tokens[len(prompt) :], depths


def gap_leaves(threshold, tau=None, N=128):
    def exiting(E, h, states, outputs, t):
        one, two = outputs[-1].softmax(-1).sort(descending=True).values[:2].tolist()
        limit = threshold
        if tau is not None:
            limit = min(1.0, max(0.0, 0.9 * threshold + 0.1 * math.exp(-tau * t / N)))
        return one - two >= limit

    return exiting


def similar(first, interval, threshold):
    """CALM compares with the layer before; where exits are further apart, as many layers before."""

    def exiting(E, h, states, outputs, t):
        if E not in range(first, L, interval):
            return False
        before = states[max(0, E - interval)]
        return (h @ before / h.norm() / before.norm()).item() >= threshold

    return exiting


def patient(E, h, states, outputs, t):
    ids = [int(logits.argmax()) for logits in outputs]
    return len(ids) > 2 and len(set(ids[-3:])) == 1


RULES = [
    (Calm(threshold=0.15), gap_leaves(0.15)),
    (Calm(threshold=0.12, tau=4.0, length=6), gap_leaves(0.12, 4.0, 6)),
    (Calm(confidence="similarity", threshold=0.9), similar(1, 1, 0.9)),
    (Calm(confidence="similarity", threshold=0.85, first=3), similar(3, 1, 0.85)),
    (Calm(confidence="similarity", threshold=0.65, first=3, interval=2), similar(3, 2, 0.65)),
    (Calm(confidence="similarity", threshold=0.3, first=2, interval=3), similar(2, 3, 0.3)),
    (Patience(patience=2), patient),
]


@pytest.mark.parametrize(("rule", "exiting"), RULES, ids=range(len(RULES)))
def test_tokens_and_depths_are_those_of_the_slow_form(model, rule, exiting):
    expected = [slow_form(model, prompt, 15, exiting) for prompt in PROMPTS]
    for options in ({}, {"batch_size": 2}, {"batch_size": 1}, {"async_readback": True}):
        found = decode(model, PROMPTS, rule, max_new_tokens=15, **options)
        assert found.tokens == [tokens for tokens, _ in expected]
        depths = sorted(depth for _, row in expected for depth in row)
        assert sorted(found.counters.depths.elements()) == depths
    assert len(set(depths)) > 1, "tokens were to exit at different layers"
    assert rule.first in (1, min(depths)), "the first exit was to be taken"


def test_work_of_one_row_is_what_hooks_count(model):
    counted = {"attention": 0, "feed_forward": 0, "head": 0}

    def count(key):
        def hook(module, args, output):
            counted[key] += output.shape[0] * output.shape[1]

        return hook

    hooks = [model.norm.register_forward_hook(count("head"))]
    for block in model.layers.values():
        hooks.append(block.attention.register_forward_hook(count("attention")))
        hooks.append(block.feed_forward.register_forward_hook(count("feed_forward")))
    counters = decode(model, PROMPTS[:1], Calm(threshold=0.15, interval=2)).counters
    for hook in hooks:
        hook.remove()
    whole = counters.token_layers + counters.prompt_token_layers
    assert whole == counted["attention"] == counted["feed_forward"]
    assert counters.head_evaluations == counted["head"]
    depths = counters.depths
    assert counters.token_layers == sum(depth * n for depth, n in depths.items())
    assert counters.projected == sum((L - depth) * n for depth, n in depths.items())
    assert set(depths) <= {1, 3, 5, 6}


def test_later_keys_and_values_are_projections_of_the_state_a_token_exited_with(model):
    generation = decode(model, PROMPTS[:1], Calm(threshold=0.0, first=2), max_new_tokens=6)
    ids = PROMPTS[0] + generation.tokens[0]
    cache = generation._state.cache
    position = len(PROMPTS[0])  # the first new token; its keys in layers 0 and 1 are its own
    h = model.embed(torch.tensor([ids[position : position + 1]]))
    positions = torch.tensor([[position]])
    cos, sin = model.rotary(positions, h)
    for l in (0, 1):
        block = model.block(l)
        k, v = cache.keys[l][:, :, : position + 1], cache.values[l][:, :, : position + 1]
        x = block.attention_norm(h)
        q = apply_rope(block.attention.split(block.attention.wq(x)), cos, sin)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        h = h + block.attention.wo(out.transpose(1, 2).flatten(2))
        h = h + block.feed_forward(block.ffn_norm(h))
    for l in range(2, L):
        block = model.block(l)
        x = block.attention_norm(h)
        k = apply_rope(block.attention.split(block.attention.wk(x)), cos, sin)
        torch.testing.assert_close(cache.keys[l][:, :, [position]], k, atol=1e-5, rtol=0)
        v = block.attention.split(block.attention.wv(x))
        torch.testing.assert_close(cache.values[l][:, :, [position]], v, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", [Calm(threshold=1.1), Patience(patience=L), Calm(first=L)])
def test_a_rule_that_never_accepts_is_plain_decoding(model, rule):
    assert decode(model, PROMPTS, rule).tokens == decode(model, PROMPTS, Autoregressive()).tokens


def test_rules_get_the_number_of_new_tokens_of_each_row(model, monkeypatch):
    counts = []

    def exiting(self, exit_):
        counts.append(exit_.new_tokens.tolist())
        return torch.zeros_like(exit_.new_tokens, dtype=torch.bool)

    monkeypatch.setattr(Calm, "exiting", exiting)
    decode(model, PROMPTS, Calm(first=L - 1), max_new_tokens=3)
    assert counts == [[0] * 4, [1] * 4, [2] * 4]
