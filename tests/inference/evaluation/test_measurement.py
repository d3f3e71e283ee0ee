"""Costs, bound and comparison follow from the times and tokens measured."""

from dataclasses import replace

import pytest

from inference.engine.sampling import Sampling
from inference.evaluation import measurement
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.evaluation.plot import arm_labels
from inference.evaluation.report import comparison, difference_warnings, speed_range
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
    assert len(result.speeds) == len(result.speedups) == 2
    assert result.speedup == pytest.approx(sum(result.speedups) / 2)
    ratios = [a / b for a, b in zip(result.speeds, plain.speeds, strict=True)]
    assert result.speedups == pytest.approx(ratios)
    assert plain.speedups == [1.0, 1.0]
    # The last of three tokens ends the row in the midst of a round.
    [whole] = measurement._decode(model, AUTOREGRESSIVE, workload, None).tokens
    stopping = replace(workload, stop_tokens=(whole[2],))
    plain, _, result = measure(model, arms, stopping, repeats=1, report=lines.append)
    assert plain.tokens == result.tokens == whole.index(whole[2]) + 1
    assert result.same_tokens == result.acceptance_rate == 1.0
    kept = plain.tokens
    assert result.drafts["stops"] == {"end": 1}
    assert result.drafts["accepted_at"] == [1] * kept
    assert result.drafts.pop("drafted_past_end") == 4 - kept
    assert plain.drafts.pop("drafted_past_end") == 0
    assert result.requests == [{"tokens": kept, **result.drafts}]
    assert plain.requests[0] == {"tokens": kept, **plain.drafts}


def test_a_comparison_names_its_base_its_spread_and_every_setting(monkeypatch):
    model = build(small()).eval().requires_grad_(False)
    workload = Workload(
        prompts=[[1, 2, 3]], max_new_tokens=4, batch_size=1, sampling=Sampling(), seed=0
    )
    twins = [SelfSpeculative(E=1, d=4), SelfSpeculative(E=1, d=4, stop=0.5, ngram=2)]
    results = measure(model, [AUTOREGRESSIVE, *twins], workload, repeats=1, report=len)
    plain, drafted, ngram = results
    assert difference_warnings(results) == []
    assert speed_range(ngram) == "-"
    plain = replace(plain, speeds=[90.0, 110.0], tokens_per_second=100.0, speedups=[1.0, 1.0])
    drafted = replace(drafted, first_difference="tie", same_tokens=0.75)
    ngram = replace(
        ngram, first_difference="fault", same_tokens=0.5, speedups=[1.4, 1.6], speedup=1.5
    )
    base, header, *rows = comparison([plain, drafted, ngram], "float32 on cpu").splitlines()
    assert base == (
        "base: autoregressive, float32 on cpu, batch 1: 100.0 tokens/s, 90.0 to 110.0 in 2 repeats"
    )
    row = next(row for row in rows if row.startswith("self_speculative:E=1:stop=0.5:ngram=2 "))
    cells = dict(zip(header.split()[:4], row.split(), strict=False))
    assert (cells["speedup"], cells["range"]) == ("1.50x", "1.40-1.60")
    assert rows[-2].startswith("warning: self_speculative:E=1: 25.0% of the tokens are not the ")
    assert rows[-2].endswith("logits are equal within rounding")
    assert "a fault" in rows[-1]
    labels = arm_labels([plain, drafted, ngram, replace(ngram, batch_size=2)])
    assert labels[2] == "3\nself\nspeculative\nE=1\nstop=0.5\nngram=2\nbatch 1"
    assert len({*labels}) == 4
