"""Rates and the bound, against numbers worked by hand."""

import json
import math
from collections import Counter

import pytest

from inference.engine.counters import Counters, describe_drafts, speedup_bound


@pytest.mark.parametrize(
    ("agreement", "d", "c", "bound"),
    [
        (0.5, 2, 0.25, (1 + 0.5 + 0.25) / 1.5),
        (0.8, 3, 0.3, (1 - 0.8**4) / (0.2 * 1.9)),
        (1.0, 4, 0.25, 5 / 2),
        (0.0, 4, 0.25, 1 / 2),
    ],
)
def test_bound(agreement, d, c, bound):
    assert speedup_bound(agreement, d, c) == pytest.approx(bound, rel=1e-12)


def test_agreement_maximises_the_likelihood_of_the_accepted_lengths():
    # Three rounds of d = 4 accepted 4, 1 and 0: P = a^4 * a (1 - a) * (1 - a).
    counters = Counters(drafted=12, accepted=5, rejections=2)

    def likelihood(a):
        return 5 * math.log(a) + 2 * math.log(1 - a)

    best = max((i / 10_000 for i in range(1, 10_000)), key=likelihood)
    assert counters.agreement == pytest.approx(best, abs=1e-4)
    assert counters.acceptance_rate == pytest.approx(5 / 12)


def test_rates():
    counters = Counters(tokens=10, rounds=4, token_layers=60, decode_seconds=0.5)
    assert counters.tokens_per_second == 20
    assert counters.tokens_per_round == 2.5
    assert counters.layers_per_token == 6
    assert counters.acceptance_rate is None
    assert counters.agreement is None


def test_adding_adds_every_count():
    total = before = Counters(tokens=1, drafted=2, decode_seconds=0.5, depths=Counter({3: 1}))
    total += Counters(tokens=4, rounds=1, depths=Counter({3: 2}), passes=Counter({(0, 4, 1): 1}))
    assert total is before
    assert total == Counters(
        tokens=5,
        drafted=2,
        rounds=1,
        decode_seconds=0.5,
        depths=Counter({3: 3}),
        passes=Counter({(0, 4, 1): 1}),
    )


def test_counts_in_json_files_keep_their_names():
    content = Counters(depths=Counter({4: 1, 2: 3}), passes=Counter({(0, 4, 1): 1})).content()
    assert ", ".join(content) == (
        "tokens, rounds, drafted, accepted, rejections, leaves, drafted_past_end, drafts, depths, "
        "thresholds, token_layers, head_evaluations, projected, draft_token_layers, "
        "draft_head_evaluations, syncs, prompt_token_layers, prefill_seconds, decode_seconds"
    )
    assert json.loads(json.dumps(content))["depths"] == {"2": 3, "4": 1}


def test_drafts_by_position_length_and_reason_worked_by_hand():
    none = {"drafted_at": [], "accepted_at": [], "accepted_lengths": [], "stops": {}}
    assert describe_drafts({}) == none
    rounds = {(3, 3, "whole"): 2, (3, 1, "rejected"): 4, (2, 2, "not_sure"): 1, (1, 1, "end"): 1}
    assert json.loads(json.dumps(describe_drafts(rounds))) == {
        "drafted_at": [8, 7, 6],
        "accepted_at": [8, 3, 2],
        "accepted_lengths": [0, 5, 1, 2],
        "stops": {"end": 1, "not_sure": 1, "rejected": 4, "whole": 2},
    }
