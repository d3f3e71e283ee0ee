"""Drafts with parts left out cost no token, and gamma moves by the equations."""

import pytest
import torch

from inference.engine.batch import Round
from inference.engine.sampling import Sampling
from inference.strategies import drafting
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.skip_draft import AdaptiveStop, SkipDraft
from models.llama import SkippedParts
from tests.inference.every_strategy import PROMPTS, decode, make_model
from tests.inference.strategies.test_self_speculative import excess

L = 6


@pytest.fixture(scope="module")
def model():
    return make_model(L)


SETTINGS = [
    SkipDraft(),
    SkipDraft(gamma=0.0, d=1),
    SkipDraft(gamma=0.1, d=3, alpha=0.5, eps=0.05),
    SkipDraft(attention=(), feed_forward=(), d=4, gamma=0.0),
    SkipDraft(attention=(0, 1, 2, 3, 4, 5), feed_forward=(3,), d=5, gamma=0.05),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_greedy_tokens_are_autoregressive_decodings(model, settings, rows):
    prompts = (PROMPTS * 2)[:rows]
    plain = decode(model, prompts, Autoregressive()).tokens
    for options in ({}, {"batch_size": 3}, {"async_readback": True}):
        found = decode(model, prompts, settings, **options)
        assert found.tokens == plain
    assert found.counters.drafted > 0


def test_a_draft_that_leaves_nothing_out_is_accepted_whole(model):
    counters = decode(model, PROMPTS, SETTINGS[3]).counters
    assert counters.acceptance_rate == 1.0
    assert counters.tokens_per_round == 5.0


def test_work_of_one_row_counts_the_parts_that_were_run(model):
    rule = SkipDraft(attention=(1, 2), feed_forward=(3,), d=2, gamma=0.0)
    counters = decode(model, PROMPTS[:1], rule).counters
    verified = counters.drafted + counters.rounds
    assert counters.token_layers == verified * L + counters.drafted * (L - 1.5)


@pytest.mark.parametrize("name", ["gamma=0", "gamma=0.35:alpha=0.5:eps=0.1"])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_tokens_have_the_full_models_distribution(biased_model, top_p, name):
    sampling = Sampling(temperature=1.2, top_p=top_p)
    text = f"skip_draft:attention=1:feed_forward=2:{name}"
    assert excess(biased_model, sampling, E=None, d=2, name=text) < 4


def test_the_statistic_catches_greedy_drafts(biased_model, monkeypatch):
    # The authors' default: drafts are the argmax, q is the softmax.
    monkeypatch.setattr(drafting, "sample", lambda weights, generator: weights.argmax(-1))
    text = "skip_draft:attention=1:feed_forward=2:gamma=0"
    assert excess(biased_model, Sampling(temperature=1.0), E=None, d=2, name=text) > 20


def test_gamma_moves_as_worked_by_hand():
    settings = SkipDraft(gamma=0.6, alpha=0.9, eps=0.01, beta1=0.5, beta2=0.9)
    stop = AdaptiveStop(settings, torch.device("cpu"))
    active = torch.tensor([True, True, False])

    def update(accepted, drafted):
        tokens = torch.zeros(3, 13, dtype=torch.long)
        stop.update(Round(tokens, torch.tensor(accepted), torch.tensor(drafted)), 12, active)

    update([2, 2, 0], [4, 4, 12])  # AR_e = 0.5, AR = 0.7 <= 0.9: up
    assert stop.rate.item() == pytest.approx(0.7)
    assert stop.gamma.item() == pytest.approx(0.9 * 0.6 + 0.1 * 0.61)
    update([4, 4, 0], [4, 4, 12])  # AR = 0.85: up
    assert stop.gamma.item() == pytest.approx(0.602)
    update([4, 4, 0], [4, 4, 0])  # AR = 0.925: down
    assert stop.gamma.item() == pytest.approx(0.601)
    update([0, 0, 0], [12, 12, 0])  # every draft had all its tokens: gamma stays
    assert stop.rate.item() == pytest.approx(0.4625)
    assert stop.gamma.item() == pytest.approx(0.601)


def test_parts_not_given_are_every_other_and_every_fourth():
    filled = SkipDraft().with_defaults(8)
    assert filled.skipped == SkippedParts(frozenset({1, 3, 5}), frozenset({2, 6}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SkipDraft(attention=(6,)), "attention: 6, skip_draft needs layers from 0 to 5"),
        (SkipDraft(feed_forward=(-1,), d=0), "feed_forward: -1, .*; d: 0"),
        (SkipDraft(gamma=1.5), "gamma: 1.5, give a number from 0 to 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        decode(model, PROMPTS, settings)
