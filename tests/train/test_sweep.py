"""A grid becomes runs, each resumed by its name, and a table of what they came to."""

import json
import shlex
import subprocess
import sys

import pytest

from train import sweep as module
from train.command_line import parse
from train.sweep import expand, read_grid, sweep

GRID = ["optim.lr=1e-3,4e-3", "early_exit.e_scale=0.2,1.0"]


def test_every_combination_is_a_run_of_its_own():
    runs = expand("demo", read_grid(GRID), ["--steps", "7", "--name", "mine"])
    configs = [parse(["demo", *run], show=False).config for run in runs]
    assert [(c.optim.lr, c.early_exit.e_scale) for c in configs] == [
        (1e-3, 0.2), (1e-3, 1.0), (4e-3, 0.2), (4e-3, 1.0),
    ]  # fmt: skip
    assert {c.steps for c in configs} == {7}
    assert [c.name for c in configs][1] == "mine-lr_1e-3-e_scale_1.0"
    assert len({c.name for c in configs}) == 4
    assert all(c.problems(world_size=2) == [] for c in configs)


def test_lines_are_printed_for_a_job_array(capsys):
    sweep(["demo", "--grid", GRID[0], "--print", "--", "--steps", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[1]) == [
        "--steps", "7", "--optim.lr", "4e-3", "--name", "demo-lr_4e-3",
    ]  # fmt: skip


def test_runs_go_one_after_another_and_the_best_comes_first(tmp_path, monkeypatch, capsys):
    started = []

    def train(command, check):
        config = parse(command[command.index("train/main.py") + 1 :], show=False).config
        started.append((config.name, command[4]))
        config.run_dir.mkdir(parents=True)
        line = {"validation/loss": 1 / config.optim.lr, "step": 7}
        line |= {f"validation/loss_exit_{l:02}": l + config.optim.lr for l in range(2)}
        lines = [json.dumps({"loss": 1}), json.dumps(line), json.dumps({"loss": 2})]
        (config.run_dir / "metrics.jsonl").write_text("\n".join(lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", train)
    sweep(
        ["demo", "--grid", "optim.lr=0.25,0.5", "--nproc_per_node", "2", "--json"]
        + [str(tmp_path / "out.json"), "--", "--output_dir", str(tmp_path)]
    )
    assert started == [
        ("demo-lr_0.25", "--nproc_per_node=2"),
        ("demo-lr_0.5", "--nproc_per_node=2"),
    ]
    assert capsys.readouterr().out.splitlines() == [
        "| optim.lr | E=1 | E=2 |",
        "|---|---|---|",
        "| 0.5 | 0.500 | 1.500 |",
        "| 0.25 | 0.250 | 1.250 |",
    ]
    assert json.loads((tmp_path / "out.json").read_text())["demo-lr_0.5"]["validation/loss"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "grid: none is given"),
        (["demo", "--grid", "optim.lr="], "grid: 'optim.lr=' expands to nothing"),
        (["demo", "--grid", "optim.lr"], "grid: 'optim.lr' expands to nothing"),
        (["demo", "--grid", "steps=1", "--grid", "steps=2"], "grid: steps is given twice"),
        (["demo", "--grid", "optim.lrr=1"], "option: --optim.lrr does not exist"),
        (["none", "--grid", "steps=1"], "preset: none does not exist"),
    ],
)
def test_a_users_error_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments, "--print"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
