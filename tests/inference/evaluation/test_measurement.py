"""Costs, bound and comparison follow from the times and tokens measured."""

from dataclasses import replace

import pytest

from inference.engine.sampling import Sampling
from inference.evaluation import measurement
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.strategies.early_exit import EarlyExit
from inference.strategies.self_speculative import SelfSpeculative
from tests.models.test_llama import build, small


def test_costs_and_bound_worked_by_hand(monkeypatch):
    exit_after_1 = EarlyExit(E=1)
    speculative = SelfSpeculative(E=1, d=4)
    # One full step takes 2 s, a draft step 0.5 s; a round of 4 drafts 5 s leaves 3 s to verify.
    seconds = {AUTOREGRESSIVE: 2.0, exit_after_1: 0.5, speculative: 5.0}
    monkeypatch.setattr(measurement, "_round_seconds", lambda *args: seconds)
    model = build(small()).eval().requires_grad_(False)
    for l in (1, 2):  # Later layers do nothing: every draft is accepted.
        model.layers[str(l)].attention.wo.weight.zero_()
        model.layers[str(l)].feed_forward.w2.weight.zero_()
    workload = Workload(
        prompts=[[1, 2, 3]], max_new_tokens=10, batch_size=1, sampling=Sampling(), seed=0
    )
    lines = []
    arms = [AUTOREGRESSIVE, exit_after_1, speculative]
    plain, early, result = measure(model, arms, workload, repeats=2, report=lines.append)
    assert [line.split(":")[0] for line in lines] == ["warm-up", "repeat 1 of 2", "repeat 2 of 2"]
    assert result.draft_cost == 0.25
    assert result.verify_cost == 1.5
    assert result.agreement == 1.0
    assert result.bound == 2.5  # (1 + 4) / (1 + 4 / 4)
    assert result.tokens_per_verify == 5.0
    assert result.share_of_bound == pytest.approx(result.speedup / 2.5)
    assert plain.bound is early.bound is plain.draft_cost is None
    assert early.same_tokens == 1.0
    assert result.first_difference is None
    assert result.tokens == 10
    # The last of three tokens ends the row in the midst of a round.
    [whole] = measurement._decode(model, AUTOREGRESSIVE, workload, None).tokens
    stopping = replace(workload, stop_tokens=(whole[2],))
    plain, _, result = measure(model, arms, stopping, repeats=1, report=lines.append)
    assert plain.tokens == result.tokens == whole.index(whole[2]) + 1
    assert result.same_tokens == result.acceptance_rate == 1.0
