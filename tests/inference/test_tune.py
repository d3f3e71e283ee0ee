"""The tuner's costs and agreement lead to its predictions, and generate uses what it found."""

import json
import shutil
import sys

import pytest
import torch

from inference import generate, tune
from inference.autoregressive import Autoregressive
from inference.decode import Generation
from inference.run import load_run
from inference.tune import Costs, exit_agreement, predict
from inference.tuned import read_tuned, tuned_path, write_tuned
from tests.inference.every_strategy import PROMPTS, make_model


def test_predictions_worked_by_hand():
    costs = Costs(full_step_seconds=1.0, draft=[0.25, 0.5], verify=[1.0, 1.25])
    found = {(p.E, p.d): p for p in predict([0.5, 0.8], costs)}
    assert found[1, 1].speedup == pytest.approx(1.5 / 1.25)
    assert found[1, 2].speedup == pytest.approx(1.75 / 1.75)
    assert found[2, 1].speedup == pytest.approx(1.8 / 1.5)
    assert found[2, 2].speedup == pytest.approx(2.44 / 2.25)
    assert [(p.E, p.d) for p in predict([0.5, 0.8], costs)][-1] == (1, 2)


def test_agreement_is_counted_where_tokens_were_decoded():
    model = make_model(4)
    prompts = [PROMPTS[2]]
    tokens = Generation(model, prompts, Autoregressive(), max_new_tokens=25).finish().tokens[0]
    row = prompts[0] + tokens
    agreement = exit_agreement(model, [row], len(prompts[0]))
    h, _ = model.run_layers(model.embed(torch.tensor([row])), 0, 2)
    said = model.exit_logits(h)[0].argmax(-1).tolist()
    same = sum(said[len(prompts[0]) - 1 + i] == token for i, token in enumerate(tokens))
    assert agreement[1] == pytest.approx(same / 25)
    assert len(agreement) == 3


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
    assert len(found["costs"]["draft"]) == 3 == len(found["costs"]["verify"])
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
