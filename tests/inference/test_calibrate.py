"""The command certifies what its losses allow, and prints the strategy to use."""

import json
import sys

import pytest

from inference import calibrate
from inference.calibrate import token_losses
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from tests.inference.every_strategy import PROMPTS, decode, make_model


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
    calibrate.main()


def test_losses_are_shares_of_tokens_that_differ():
    model = make_model(6)
    plain = decode(model, PROMPTS, Autoregressive(), max_new_tokens=12).tokens
    assert token_losses(model, PROMPTS, plain, Calm(threshold=1.1), 12) == [0.0] * 4
    early = decode(model, PROMPTS, Calm(threshold=0.0), max_new_tokens=12).tokens
    expected = [
        sum(a != b for a, b in zip(e, p, strict=True)) / 12
        for e, p in zip(early, plain, strict=True)
    ]
    assert token_losses(model, PROMPTS, plain, Calm(threshold=0.0), 12) == expected
    assert max(expected) > 0


def test_the_command_prints_and_writes(run_folder, monkeypatch, capsys, tmp_path):
    few = ("--run", run_folder, "--prompt_tokens", 4, "--max_new_tokens", 4, "--steps", 4)
    run_command(
        monkeypatch, *few, "--prompts", 60, "--delta", 0.3, "--eps", 0.1,
        "--strategy", "calm:first=2", "--json", tmp_path / "c.json",
    )  # fmt: skip
    out = capsys.readouterr().out
    tested = json.loads((tmp_path / "c.json").read_text())
    assert [t["threshold"] for t in tested][:2] == [1.0, 0.75]
    assert tested[0]["certified"]
    lowest = min(t["threshold"] for t in tested if t["certified"])
    assert f"threshold={lowest}" in out or lowest == 0.9
    assert "first=2" in out
    monkeypatch.setattr(calibrate, "token_losses", lambda *_: [0.5] * 29)
    run_command(monkeypatch, *few, "--prompts", 29)
    assert "nothing can be certified" in capsys.readouterr().out
    monkeypatch.setattr(calibrate, "Generation", None)  # nothing is decoded
    with pytest.raises(SystemExit):
        run_command(monkeypatch, *few, "--prompts", 28)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: prompts: 28, can certify no delta of 0.1 with eps 0.05 even ")
    assert line.endswith("give at least 29")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--delta", 1), "delta: 1.0, give a number between 0 and 1"),
        (("--steps", 0), "steps: 0"),
        (("--strategy", "patience"), "strategy: patience, only calm has a threshold"),
        (("--strategy", "calm:first=9"), "first: 9, give 1 to 4 layers"),
    ],
)
def test_a_users_error_is_one_line(run_folder, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, "--run", run_folder, *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert err.count("\n") == 1
