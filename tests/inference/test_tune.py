"""The tuner's costs and agreement lead to its predictions, and generate uses what it found."""

import json
import shutil
import sys

import pytest
import torch

from inference import generate, tune
from inference.costs import Costs, measure_costs, predict, tokens_per_round
from inference.decode import Generation
from inference.oracle import record_exits
from inference.run import load_run
from inference.self_speculative import SelfSpeculative
from inference.tune import cost_table
from inference.tuned import read_tuned, tuned_path, write_tuned
from tests.inference.every_strategy import PROMPTS, make_model


def test_predictions_worked_by_hand():
    costs = Costs(
        full_step_seconds=1.0, draft=[0.5, 0.7], layers=[0.9, 1.0, 1.2], head=[0.1, 0.2, 0.3]
    )
    # E = 1 is wrong at places 1 and 4, E = 2 never.
    last = [5, 6, 7, 8, 9, 1]
    trace = torch.tensor([[5, 0, 7, 8, 0, 1], last, last])
    assert tokens_per_round([trace], 1, 2) == 6 / 3  # 5 6 | 7 8 9 | 1
    assert tokens_per_round([trace], 1, 1) == 6 / 4  # 5 6 | 7 8 | 9 | 1
    assert tokens_per_round([trace], 2, 2) == 6 / 2
    found = {(p.E, p.d): p for p in predict([trace], costs, 2)}
    assert found[1, 1].agreement == pytest.approx(4 / 6)
    # draft: a step of E = 1 less the head; verify: 1/3 of one token's layers, 2/3 of two tokens'.
    assert found[1, 1].draft == pytest.approx(0.4)
    assert found[1, 1].verify == pytest.approx(0.9 / 3 + 1.0 * 2 / 3)
    assert found[1, 1].head == pytest.approx(0.1 + 0.2)
    assert found[1, 1].speedup == pytest.approx(1.5 / (0.4 + 0.3 + 2 / 3 + 0.3))
    assert found[2, 2].speedup == pytest.approx(3 / (2 * 0.7 + 0.6 + 0.4 + 0.3))
    ordered = [p.speedup for p in predict([trace], costs, 2)]
    assert ordered == sorted(ordered, reverse=True)
    table = cost_table(predict([trace], costs, 2), 3).splitlines()
    assert [row.split()[0] for row in table] == ["E", "1", "2"]


def test_tokens_of_a_round_are_those_that_are_decoded():
    model = make_model(4)
    for E, d in ((1, 2), (2, 3)):
        drafted = Generation(model, PROMPTS, SelfSpeculative(E=E, d=d), max_new_tokens=25)
        alone = [
            Generation(model, [p], SelfSpeculative(E=E, d=d), max_new_tokens=25).finish()
            for p in PROMPTS
        ]
        tokens = drafted.finish().tokens
        traces = [record_exits(model, p + t, len(p)) for p, t in zip(PROMPTS, tokens, strict=True)]
        rounds = sum(one.counters.rounds for one in alone)
        assert tokens_per_round(traces, E, d) == pytest.approx(100 / rounds)


def test_costs_are_measured_in_full_steps():
    costs = measure_costs(make_model(3), [[1, 2, 3, 4]], 2)
    assert len(costs.draft) == 2
    assert len(costs.layers) == len(costs.head) == 3
    assert 0 < costs.head[0] < costs.layers[0]
    assert costs.full_step_seconds > 0


def test_a_threshold_is_tuned_under_the_agreement_asked_for(
    run_folder, tmp_path, monkeypatch, capsys
):
    shutil.copytree(run_folder, tmp_path / "run")
    run_command(
        monkeypatch, tune, "--run", tmp_path / "run", "--prompts", 2, "--prompt_tokens", 8,
        "--max_new_tokens", 12, "--repeats", 1, "--strategy", "calm:first=2",
        "--thresholds", "0,1.1", "--min_agreement", 0.999, "--json", tmp_path / "out.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())["measured"]
    settings = {arm["settings"]: arm for arm in found}
    never, always = settings["calm:threshold=1.1:first=2"], settings["calm:threshold=0.0:first=2"]
    assert never["full_choice"] == never["same_tokens"] == 1.0
    assert always["mean_depth"] == 2.0
    assert always["full_choice"] < 0.999
    assert read_tuned(load_run(tmp_path / "run")) in (
        "autoregressive",
        "calm:threshold=1.1:first=2",
    )
    with pytest.raises(SystemExit):
        run_command(monkeypatch, tune, "--run", tmp_path / "run", "--strategy", "early_exit:E=1")
    assert "early_exit:E=1 has nothing to tune" in capsys.readouterr().err


def run_command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()


def test_what_is_tuned_is_decoded_with(run_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    folder = tmp_path / "run"
    run_command(
        monkeypatch, tune, "--run", folder, "--prompts", 2, "--prompt_tokens", 8, "--top", 1,
        "--max_new_tokens", 12, "--repeats", 1, "--max_d", 3, "--json", tmp_path / "out.json",
    )  # fmt: skip
    out = capsys.readouterr().out
    run = load_run(folder)
    text = read_tuned(run)
    assert text is not None
    assert str(tuned_path(run)) in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["costs"]["draft"]) == 3
    assert len(found["costs"]["layers"]) == 4
    assert all(arm["same_tokens"] == 1.0 for arm in found["measured"])
    fastest = max(found["measured"], key=lambda arm: arm["speedup"])
    assert fastest["settings"] == text
    write_tuned(run, "early_exit:E=2", {})
    run_command(monkeypatch, generate, "--run", folder, "--prompt", "the", "--max_new_tokens", 3)
    assert "tuned for this checkpoint: early_exit:E=2" in capsys.readouterr().err
    run_command(
        monkeypatch, generate, "--run", folder, "--prompt", "the", "--max_new_tokens", 3,
        "--strategy", "autoregressive",
    )  # fmt: skip
    assert "tuned" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ('{"strategy": "x", "weights": "y"}', "belongs to another checkpoint")],
)
def test_a_file_of_something_else_is_refused(run_folder, tmp_path, content, message):
    shutil.copytree(run_folder, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert read_tuned(run) is None
    write_tuned(run, "early_exit:E=2", {})
    tuned_path(run).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tuned(run)
