"""On a model whose exits have parts of their own, each is read through them and the last is not."""

import math

import numpy as np
import pytest
import torch

from data.shards import TokenStream
from data.windows import StreamWindows
from inference.engine.generation import Generation
from inference.engine.prefill import allocate, prefill
from inference.engine.products import pack
from inference.engine.sampling import Sampling
from inference.evaluation.exit_quality import evaluate_exits
from inference.evaluation.exit_traces import record_exits
from inference.fitting.jump_fitting import measure_jump
from inference.fitting.traces import record
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.drafting import draft
from inference.strategies.dynamic import Dynamic
from inference.strategies.early_exit import EarlyExit
from inference.strategies.free import Free
from inference.strategies.gate import Gate
from inference.strategies.gate_classifiers import save_gate
from inference.strategies.jump import Jump
from inference.strategies.jump_maps import JumpMap, save_jump
from inference.strategies.reduced_head import reduced_head
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.skip_draft import SkipDraft
from models.llama import NOTHING
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.strategies import test_free, test_row_exits
from tests.inference.strategies.test_gate_classifiers import random_gate
from tests.models.test_exit_parts import shake, slow_reading

L, EXITS = 6, (2, 4)


@pytest.fixture(scope="module", params=[False, True], ids=["norm", "mlp"])
def model(request):
    model = make_model(L, own_exits=EXITS, own_exit_mlp=request.param)
    shake(model)
    return model


def slow_logits(model, x, E):
    return slow_reading(model, x, E) @ model.lm_head.weight.T


def slow_greedy(model, prompt, count, E):
    """Decode with the first E layers, all tokens again for every new one."""
    tokens = list(prompt)
    for _ in range(count):
        h, _ = model.run_layers(model.embed(torch.tensor([tokens])), 0, E)
        tokens.append(int(slow_logits(model, h[0, -1:], E).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("E", range(1, L + 1))
def test_early_exit_decodes_what_a_slow_forward_through_its_own_parts_does(model, E):
    expected = [slow_greedy(model, prompt, 12, E) for prompt in PROMPTS]
    found = decode(model, PROMPTS, EarlyExit(E=E), max_new_tokens=12)
    assert found.tokens == expected
    own_mlp = model.config.own_exit_mlp and E in EXITS
    assert found.counters.layers_per_token == E + 0.5 * own_mlp


LOSSLESS = [
    *(SelfSpeculative(E=E, d=3) for E in range(1, L)),
    SelfSpeculative(E=2, d=4, stop=0.05, ngram=2),
    Dynamic(verify_costs=(0.1,), probe=2),
    Dynamic(verify_costs=(0.1,), lookup_cost=0.1, probe=1, ngram=1),
    SkipDraft(d=3),
    Free(exits=EXITS, threshold=0.1, rollback="exact", max_pending=4),
    Calm(threshold=1.1),
]


@pytest.mark.parametrize("strategy", LOSSLESS, ids=range(len(LOSSLESS)))
def test_what_is_lossless_gives_the_plain_greedy_tokens(model, strategy):
    plain = [slow_greedy(model, prompt, 20, L) for prompt in PROMPTS]
    assert decode(model, PROMPTS, Autoregressive()).tokens == plain
    for options in ({}, {"batch_size": 1}):
        assert decode(model, PROMPTS, strategy, **options).tokens == plain


@pytest.mark.parametrize("part", [False, True])
def test_drafts_are_what_the_exit_predicts_through_its_own_parts(model, part):
    for E in (2, 3, 4):
        state = allocate(model, 4, slots=30, sampling=Sampling(), seed=0)
        prefill(state, PROMPTS, (L, NOTHING))
        head = reduced_head(model, torch.randperm(61)) if part else None
        drafted = draft(state, E, 4, head=head)
        assert drafted.tokens.tolist() == [slow_greedy(model, prompt, 4, E) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("rule", "exiting"), test_row_exits.RULES, ids=range(len(test_row_exits.RULES))
)
def test_rows_exit_where_the_slow_form_does_with_its_tokens(model, rule, exiting):
    expected = [test_row_exits.slow_form(model, prompt, 15, exiting) for prompt in PROMPTS]
    for options in ({}, {"batch_size": 1}):
        found = decode(model, PROMPTS, rule, max_new_tokens=15, **options)
        assert found.tokens == [tokens for tokens, _ in expected]
        depths = [depth for _, row in expected for depth in row]
        assert sorted(found.counters.depths.elements()) == sorted(depths)


@pytest.mark.parametrize("rule", [rule for rule in test_free.RULES if not rule.adapt], ids=range(7))
def test_deferred_tokens_exit_where_the_slow_form_does(model, rule):
    expected = [test_free.slow_form(model, prompt, 20, rule) for prompt in PROMPTS]
    found = decode(model, PROMPTS, rule)
    assert found.tokens == [tokens for tokens, _ in expected]


def test_a_gate_exits_to_the_exits_own_parts(model, tmp_path):
    save_gate(tmp_path / "gate", random_gate("linear"), model)
    rule = Gate(path=tmp_path / "gate", threshold=0.45)

    def exiting(E, h, before, predicted, t):
        gate = random_gate("linear")
        return gate.score(E, h[None], h[None]).item() >= 0.45

    expected = [test_row_exits.slow_form(model, prompt, 15, exiting) for prompt in PROMPTS]
    found = decode(model, PROMPTS, rule, max_new_tokens=15)
    assert found.tokens == [tokens for tokens, _ in expected]
    assert len(found.counters.depths) > 2


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_only_exits_that_some_row_left_at_are_evaluated(model, tmp_path, batch_size, gated):
    save_gate(tmp_path / "gate", random_gate("linear"), model)
    rule = Calm(confidence="similarity", threshold=0.9)
    if gated:
        rule = Gate(path=tmp_path / "gate", threshold=0.45)
    evaluated, depths = [], []
    hooks = [
        model.own_exits[str(E)].register_forward_hook(lambda *_, E=E: evaluated.append(E))
        for E in EXITS
    ]
    generation = Generation(model, PROMPTS, rule, max_new_tokens=15, batch_size=batch_size)
    run_round = generation._run_round

    def watched(n):
        result = run_round(n)
        depths.append(result.depths[:, 0].tolist())
        return result

    generation._run_round = watched
    counters = generation.finish().counters
    for hook in hooks:
        hook.remove()
    left = [E for rows in depths for E in EXITS if E in rows]
    assert evaluated == left
    assert 0 < len(left) < len(EXITS) * len(depths)
    own = 0.5 * len(left) if model.config.own_exit_mlp else 0.0
    assert counters.token_layers == batch_size * (sum(map(max, depths)) + own)
    assert counters.syncs == sum(min(max(rows), L - 1) for rows in depths)


def test_what_a_map_gives_is_read_as_the_last_layers_state(model, tmp_path):
    zeros = {f"{E}.B": torch.zeros(32, 32) for E in range(1, L)}
    save_jump(tmp_path / "jump", JumpMap(zeros), model, {})
    for prompt in PROMPTS:
        [tokens] = decode(model, [prompt], Jump(path=tmp_path / "jump", E=2)).tokens
        h, _ = model.run_layers(model.embed(torch.tensor([prompt])), 0, 2)
        assert tokens[0] == int(slow_logits(model, h[0, -1:], None).argmax())
        calm = Calm(threshold=0.0, first=2, jump=tmp_path / "jump")
        assert decode(model, [prompt], calm).tokens[0][0] == tokens[0]


def test_maps_are_measured_against_what_own_parts_predict(model):
    windows = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(3))
    jump = JumpMap({f"{E}.B": torch.zeros(32, 32) for E in range(1, L)})
    _, x = model.run_layers(model.embed(windows), 0, L, exit_layers=range(L))
    last = slow_logits(model, x[L - 1].flatten(0, 1), L).argmax(-1)
    for fit in measure_jump(model, jump, windows):
        state = x[fit.E - 1].flatten(0, 1)
        for found, E in ((fit.agreement_identity, fit.E), (fit.agreement, None)):
            predicted = slow_logits(model, state, E).argmax(-1)
            assert found == pytest.approx((predicted == last).float().mean().item())


def test_agreement_that_dynamic_observes_is_what_a_full_forward_finds(model, started):
    settings = Dynamic(d=3, probe=1, longest_probe=1, memory=0.999999, verify_costs=(100.0,))
    generation = decode(model, [[7, 8, 7]], settings, max_new_tokens=30)
    ids = [7, 8, 7] + generation.tokens[0]
    predicted = slow_choices(model, ids)[:, 2:-1]
    started[0].read_stats(started[0].rounds + 1)
    for E in range(1, L):
        agreed = (predicted[E - 1] == predicted[L - 1]).sum().item()
        assert started[0].exits[E].agreed == pytest.approx(1.0 + agreed, abs=0.01)


def slow_choices(model, ids):
    _, x = model.run_layers(model.embed(torch.tensor([ids])), 0, L, exit_layers=range(L))
    return torch.stack([slow_logits(model, x[E - 1][0], E).argmax(-1) for E in range(1, L + 1)])


def test_drafting_with_own_parts_costs_what_it_reads(model, started):
    decode(model, PROMPTS, Dynamic(), max_new_tokens=1)
    block = 2 * 32 * 8 * (4 + 2) + 3 * 32 * 48 + 2 * 32
    own = (32 + (3 * 32 * 48 + 32 if model.config.own_exit_mlp else 0)) / block
    head = 32 * 61 / block
    expected = {E: (E + own * (E in EXITS) + head) / (L + head) for E in range(1, L)}
    assert started[0].draft_costs == pytest.approx(expected)


def test_traces_and_the_oracle_record_what_own_parts_predict(model):
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(3))[0].tolist()
    predicted = slow_choices(model, ids)
    assert torch.equal(record_exits(model, ids, 1), predicted[:, :-1])
    trace = record(model, torch.tensor([ids]), range(1, L), "")
    assert torch.equal(trace.agrees, predicted[:-1] == predicted[-1])


def test_evaluates_table_equals_a_slow_one(model):
    draw = np.random.default_rng(0)
    stream = TokenStream([draw.integers(61, size=100).astype(np.uint16)])
    windows = StreamWindows(stream, 16)
    exits, tokens = evaluate_exits(model, windows, bytes_per_token=2.5, max_tokens=90)
    assert tokens == 80
    losses, choices = torch.zeros(L), [[] for _ in range(L)]
    for window in range(5):
        ids = torch.from_numpy(stream.read(16 * window, 17)).long()
        _, x = model.run_layers(model.embed(ids[None, :-1]), 0, L, exit_layers=range(L))
        for E in range(1, L + 1):
            logits = slow_logits(model, x[E - 1][0], E)
            losses[E - 1] += -logits.log_softmax(-1)[torch.arange(16), ids[1:]].sum() / 80
            choices[E - 1] += logits.argmax(-1).tolist()
    for E, quality in enumerate(exits, start=1):
        assert quality.loss == pytest.approx(losses[E - 1].item(), abs=1e-4)
        assert quality.perplexity == pytest.approx(math.exp(quality.loss), rel=1e-5)
        same = np.mean(np.array(choices[E - 1]) == np.array(choices[-1]))
        assert quality.agreement == pytest.approx(same)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_packed_model_decodes_the_same(monkeypatch):
    monkeypatch.setattr("inference.engine.products.PACKED_ELEMENTS", 1000)
    packed, plain = (make_model(L, own_exits=EXITS, own_exit_mlp=True) for _ in range(2))
    for each in (packed, plain):
        shake(each)
    pack(packed)
    kind = type(packed.own_exits["2"].feed_forward.w1).__name__
    assert kind == "TransposedLinear"
    for E in (2, 3):
        tokens = [decode(each, PROMPTS, EarlyExit(E=E)).tokens for each in (packed, plain)]
        assert tokens[0] == tokens[1]
