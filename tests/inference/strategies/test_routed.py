"""A model with routers decodes alike under every strategy, and `routed` saves what they skip."""

import pytest
import torch

from inference.engine.generation import Generation
from inference.engine.state import DecodeState
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import describe, parse_strategy
from inference.strategies.routed import Routed
from models.llama import Llama
from tests.inference.engine.test_generation import ALL
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.models.test_llama import small
from tests.models.test_router import probability, scramble
from tests.models.token_by_token import token_by_token

L = 6
LOSSLESS = [
    "routed",
    "self_speculative:E=1:d=4",
    "self_speculative:E=3:d=4:stop=0.1:ngram=1",
    "dynamic:d=3:verify_costs=0.2:probe=2",
    "skip_draft:attention=1+2:feed_forward=2:d=3:gamma=0.1",
    "skip_draft:attention=1+4:feed_forward=1+4:d=3",
    "free:exits=2:threshold=0.08:max_pending=4:rollback=exact",
    "calm:threshold=2.0",
]


@pytest.fixture(scope="module")
def model():
    model = Llama(small(n_layers=L, n_kv_heads=2, router="linear"))
    model.load_state_dict(make_model(L).state_dict(), strict=False)
    scramble(model)
    return model.eval().requires_grad_(False)


def slow_greedy(model, prompt, count):
    """Decode without a cache, token by token; return tokens and the layers each ran."""
    tokens, depths = list(prompt), []
    for _ in range(count):
        gates = {}

        def weights(l, states, gates=gates):
            gates[l] = [float(probability(model, l, h) > 0.5) for h in states]
            return gates[l]

        outputs = token_by_token(model, torch.tensor(tokens), weights)
        depths.append(int(sum(gates[l][-1] for l in range(L))))
        tokens.append(int(model.exit_logits(outputs[-1][-1]).argmax()))
    return tokens[len(prompt) :], depths


def test_tokens_and_depths_are_those_of_the_slow_form(model):
    slow = [slow_greedy(model, prompt, 12) for prompt in PROMPTS]
    depths = sorted(depth for _, row in slow for depth in row)
    assert 0 < sum(depths) < L * len(depths)
    assert len(set(depths)) > 1
    assert decode(model, PROMPTS, Autoregressive(), max_new_tokens=12).tokens == [
        tokens for tokens, _ in slow
    ]
    for options in ({}, {"batch_size": 2}, {"batch_size": 1}, {"async_readback": True}):
        found = decode(model, PROMPTS, Routed(), max_new_tokens=12, **options)
        assert found.tokens == [tokens for tokens, _ in slow]
        assert sorted(found.counters.depths.elements()) == depths


@pytest.mark.parametrize("text", LOSSLESS)
def test_what_is_lossless_stays_so(model, text):
    plain = decode(model, PROMPTS, Autoregressive()).tokens
    assert decode(model, PROMPTS, parse_strategy(text)).tokens == plain
    assert [decode(model, [p], parse_strategy(text)).tokens[0] for p in PROMPTS] == plain


@pytest.mark.parametrize("strategy", [*ALL, Routed()], ids=describe)
def test_every_strategy_decodes_rows_as_alone_and_reads_no_unwritten_slot(model, strategy):
    alone = [decode(model, [prompt], strategy).tokens[0] for prompt in PROMPTS]
    assert decode(model, PROMPTS, strategy).tokens == alone
    generation = Generation(model, PROMPTS[:1], strategy, max_new_tokens=20)
    for buffer in generation._state.cache.keys + generation._state.cache.values:
        buffer.fill_(torch.nan)
    assert generation.finish().tokens == alone[:1]


def count_work(model, prompts):
    """Decode with `routed` and count with hooks; return counters and counts."""
    counted = {"attention": 0, "feed_forward": 0, "projected": 0}

    def count(key):
        def hook(module, args, output):
            counted[key] += output.shape[0] * output.shape[1]

        return hook

    hooks = []
    for block in model.layers.values():
        hooks.append(block.attention.register_forward_hook(count("attention")))
        hooks.append(block.feed_forward.register_forward_hook(count("feed_forward")))
        hooks.append(block.attention.wk.register_forward_hook(count("projected")))
    counters = decode(model, prompts, Routed()).counters
    for hook in hooks:
        hook.remove()
    return counters, counted


@pytest.mark.parametrize("rows", [1, 4])
def test_reported_work_is_what_hooks_count(model, rows):
    counters, counted = count_work(model, PROMPTS[:rows])
    whole = counters.prompt_token_layers + counters.token_layers
    assert whole == counted["attention"] == counted["feed_forward"]
    assert counters.projected == counted["projected"] - counted["attention"] > 0
    assert counters.token_layers + counters.projected == 20 * rows * L
    assert counters.syncs == 20 * L
    assert counters.depths.total() == 20 * rows
    if rows == 1:
        assert sum(depth * n for depth, n in counters.depths.items()) == counters.token_layers
        assert counters.mean_depth == counters.layers_per_token


def test_skipped_tokens_have_keys_and_values_of_their_state(model):
    generation = Generation(model, PROMPTS[:1], Routed(), max_new_tokens=12).finish()
    row = torch.tensor([PROMPTS[0] + generation.tokens[0]])[:, :-1]
    state: DecodeState = generation._state
    whole = Generation(model, row.tolist(), Autoregressive(), max_new_tokens=1).finish()._state
    for l in range(L):
        for ours, full in (
            (state.cache.keys[l], whole.cache.keys[l]),
            (state.cache.values[l], whole.cache.values[l]),
        ):
            slots = row.shape[1]
            torch.testing.assert_close(ours[:, :, :slots], full[:, :, :slots], atol=1e-5, rtol=1e-5)


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match=r"^strategy: routed needs a model with routers"):
        decode(make_model(L), PROMPTS, Routed())
