"""The oracle is the least depth, and no rule that keeps every token is below it."""

import json
import sys

import pytest
import torch

from inference import oracle
from inference.evaluation.exit_traces import record_exits
from inference.evaluation.oracle import find_oracle, speed_model
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.patience import Patience
from inference.strategies.self_speculative import SelfSpeculative
from tests.inference.every_strategy import PROMPTS, decode, make_model

TRACE = torch.tensor([[1, 5, 3, 9], [2, 5, 4, 4], [1, 5, 3, 4], [1, 5, 4, 4]])


def test_worked_by_hand():
    found = find_oracle([TRACE])
    assert found.tokens == 4
    assert found.agreement == [0.5, 0.75, 0.75, 1.0]
    assert found.least_depth == {1: 2, 2: 2}
    assert found.settled_depth == {1: 1, 2: 1, 3: 1, 4: 1}
    assert found.mean_least == 1.5
    assert found.mean_settled == 2.5
    assert found.sequences == [4]
    assert find_oracle([TRACE[:, 1:2], TRACE[:, 2:]]).sequences == [1, 2]


def test_bursts_worked_by_hand():
    right = [True, True, False, True, True, True, True, False, True]
    trace = torch.stack((torch.tensor(right).long(), torch.ones(9, dtype=torch.long)))
    # Bursts of 2: TT -, then (False is the last layer's own) TT - T(F) ...
    kept, flushed = speed_model([trace], 1, 2)
    bursts = [[True, True], [True, True], [True, False], [True]]
    assert kept == pytest.approx(sum(b.index(False) if False in b else len(b) for b in bursts) / 4)
    assert flushed == pytest.approx(1 / 4)


def test_the_pipeline_keeps_what_self_speculation_accepts():
    model = make_model(6)
    whole = decode(model, PROMPTS[:1], Autoregressive(), max_new_tokens=60)
    trace = record_exits(model, PROMPTS[0] + whole.tokens[0], len(PROMPTS[0]))
    for E in (2, 4):
        kept, _ = speed_model([trace], E, 3)
        counters = decode(model, PROMPTS[:1], SelfSpeculative(E=E, d=3), max_new_tokens=60).counters
        # The last round is cut where the row ends.
        assert kept == pytest.approx(counters.accepted / counters.rounds, abs=0.1)


@pytest.mark.parametrize("rule", [Calm(threshold=0.3), Calm(threshold=0.6), Patience(patience=3)])
def test_no_rule_that_keeps_every_token_is_below_the_oracle(rule):
    model = make_model(6)
    whole = decode(model, PROMPTS, Autoregressive())
    found = find_oracle(
        [
            record_exits(model, prompt + tokens, len(prompt))
            for prompt, tokens in zip(PROMPTS, whole.tokens, strict=True)
        ]
    )
    counters = decode(model, PROMPTS, rule).counters
    agreeing = decode(model, PROMPTS, rule).tokens == whole.tokens
    assert counters.mean_depth >= found.mean_least or not agreeing


def test_the_command_prints_and_writes(run_folder, monkeypatch, capsys, tmp_path):
    arguments = ["--run", run_folder, "--prompts", 3, "--prompt_tokens", 8, "--max_new_tokens", 10]
    arguments += ["--json", tmp_path / "o.json"]
    monkeypatch.setattr(sys, "argv", ["oracle", *map(str, arguments)])
    oracle.main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["tokens"] == 30
    assert found["agreement"][-1] == 1.0
    assert "mean layers" in out
