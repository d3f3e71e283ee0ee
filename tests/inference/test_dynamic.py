"""The choice of E and d is the best of its formula, learns from the exits, and costs no token."""

import pytest
import torch

from inference import dynamic
from inference.autoregressive import Autoregressive
from inference.dynamic import Dynamic, best_pair
from inference.sampling import Sampling
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.test_self_speculative import excess
from tests.models.test_llama import build, small


@pytest.fixture(scope="module")
def model():
    return make_model(6)


def test_the_best_pair_worked_by_hand():
    # One exit, a = 0.8, c = 0.25: d = 1: 1.8/1.25 = 1.44; 2: 2.44/1.5 = 1.627; 3: 2.952/1.75 =
    # 1.687; 4: 3.3616/2 = 1.681.
    assert best_pair([0.8], [0.25], 1.0, 10) == (1, 3)
    assert best_pair([0.8], [0.25], 1.0, 2) == (1, 2)
    assert best_pair([0.8], [0.25], 1.0, 0) == (1, 0)
    assert best_pair([0.2], [0.25], 1.0, 10) == (1, 0), "1.2 / 1.25 is less than plain decoding"
    assert best_pair([0.1, 0.9, 0.91], [0.2, 0.4, 0.8], 1.0, 2) == (2, 2)
    assert best_pair([0.8], [0.25], 3.0, 4) == (1, 0), "a dear verification pays for no draft"


SETTINGS = [
    Dynamic(),
    Dynamic(probe=1, d=3),
    Dynamic(head_cost=0.0, verify_cost=0.2, probe=2),
    Dynamic(verify_cost=0.2, stop=0.2),
    Dynamic(verify_cost=0.2, ngram=2),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_greedy_tokens_are_autoregressive_decodings(model, settings, rows):
    prompts = (PROMPTS * 2)[:rows]
    plain = decode(model, prompts, Autoregressive(), max_new_tokens=30).tokens
    for options in ({}, {"reads_late": True}, {"batch_size": 3}):
        found = decode(model, prompts, settings, max_new_tokens=30, **options)
        assert found.tokens == plain
    if settings.verify_cost < 1:
        assert found.counters.drafted > 0


def test_sampled_tokens_have_the_full_models_distribution(biased_model):
    hot = Sampling(temperature=1.0)
    name = "dynamic:verify_cost=0.1:probe=1"
    assert excess(biased_model, hot, E=None, d=2, name=name) < 4


def test_the_statistic_catches_a_biased_choice(biased_model, monkeypatch):
    def settle_all(state, drafted, p):
        return dynamic.Round(
            torch.cat((drafted.tokens, p[:, -1:].argmax(-1)), 1),
            torch.full_like(state.positions, drafted.tokens.shape[1]),
            torch.full_like(state.positions, drafted.tokens.shape[1]),
        )

    monkeypatch.setattr(dynamic, "settle", settle_all)
    hot = Sampling(temperature=1.0)
    assert excess(biased_model, hot, E=None, d=2, name="dynamic:verify_cost=0.1") > 20


def test_an_exit_that_always_agrees_is_found_and_used():
    model = build(small(n_layers=6)).eval().requires_grad_(False)
    for l in (2, 3, 4, 5):  # from two layers on, all exits agree
        model.layers[str(l)].attention.wo.weight.zero_()
        model.layers[str(l)].feed_forward.w2.weight.zero_()
    settings = Dynamic(d=4, probe=1, head_cost=0.5)
    generation = dynamic_rounds(model, settings)
    assert generation.counters.acceptance_rate > 0.9
    rounds = generation._decoder
    agreement = [a / rounds.seen for a in rounds.agreed]
    assert min(agreement[1:]) > 0.9
    assert best_pair(agreement, rounds.draft_costs, 1.0, 4) == (2, 4)


def dynamic_rounds(model, settings):
    return decode(model, PROMPTS, settings, max_new_tokens=40)


def test_the_exits_agreement_is_what_a_full_forward_finds(model):
    settings = Dynamic(d=1, probe=1, memory=0.999999, verify_cost=100.0)  # never drafts
    generation = decode(model, PROMPTS[:1], settings, max_new_tokens=30)
    ids = torch.tensor([PROMPTS[0] + generation.tokens[0]])
    _, exits = model.run_layers(model.embed(ids), 0, 6, exit_layers=range(6))
    said = {
        l: model.exit_logits(x).argmax(-1)[0, len(PROMPTS[0]) - 1 : -1] for l, x in exits.items()
    }
    for E in range(1, 6):
        true = (said[E - 1] == said[5]).sum().item()
        assert generation._decoder.agreed[E - 1] == pytest.approx(1.0 + true, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Dynamic(d=0), "d: 0, give at least 1"),
        (Dynamic(probe=0, memory=1.0), "probe: 0, .*; memory: 1.0, give a number between"),
        (Dynamic(head_cost=-1.0), "head_cost: -1.0"),
        (Dynamic(verify_cost=0.0), "verify_cost: 0.0"),
        (Dynamic(ngram=-1), "ngram: -1"),
    ],
    ids=range(5),
)
def test_settings_that_do_not_fit_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, settings)
