"""A grid becomes runs, each resumed by its name, and a table of what they came to."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import ROOT
from train import sweep as module
from train.config.command_line import parse
from train.run_folder.events import write_status
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
    assert {c.metrics.group for c in configs} == {"mine-lr-e_scale"}
    [own] = expand("demo", {"optim.lr": ["1e-3"]}, ["--metrics.group", "ours"])
    assert parse(["demo", *own], show=False).config.metrics.group == "ours"
    assert all(c.problems(world_size=2) == [] for c in configs)


def test_lines_are_printed_for_a_job_array(capsys):
    sweep(["demo", "--grid", GRID[0], "--print", "--", "--steps", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[1]) == [
        "--steps", "7", "--optim.lr", "4e-3", "--metrics.group", "demo-lr",
        "--name", "demo-lr_4e-3",
    ]  # fmt: skip


def finish(config, state="finished"):
    """Leave what a run of this learning rate would: its losses, and how it stands."""
    config.run_dir.mkdir(parents=True)
    line = {"validation/loss": 1 / config.optim.lr, "step": 7}
    line |= {f"validation/loss_exit_{l:02}": l + config.optim.lr for l in range(2)}
    lines = [json.dumps({"loss": 1}), json.dumps(line), json.dumps({"loss": 2})]
    (config.run_dir / "metrics.jsonl").write_text("\n".join(lines))
    write_status([config.run_dir / "status.json"], state, 7)


TABLE = [
    "| optim.lr | E=1 | E=2 |",
    "|---|---|---|",
    "| 0.5 | 0.500 | 1.500 |",
    "| 0.25 | 0.250 | 1.250 |",
]


def test_runs_go_one_after_another_and_the_best_comes_first(tmp_path, monkeypatch, capsys):
    started = []

    def train(command, check):
        config = parse(
            command[command.index(str(ROOT / "train" / "main.py")) + 1 :], show=False
        ).config
        started.append((config.name, command[4]))
        finish(config)
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
    assert capsys.readouterr().out.splitlines() == TABLE
    assert json.loads((tmp_path / "out.json").read_text())["demo-lr_0.5"]["validation/loss"] == 2


def test_ctrl_c_ends_the_sweep_once_the_run_has_ended(monkeypatch, capsys):
    ended = []

    def train(command, check):
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(command)
        return subprocess.CompletedProcess(command, 130)

    monkeypatch.setattr(module.subprocess, "run", train)
    monkeypatch.setattr(sys, "argv", ["sweep", "demo", "--grid", "optim.lr=0.25,0.5"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert (stop.value.code, len(ended)) == (130, 1)
    assert capsys.readouterr().err == "run 1 of 2: demo-lr_0.25\ninterrupted\n"


def test_a_table_has_the_finished_runs_and_names_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.subprocess, "run", None)  # nothing may be started
    words = ["demo", "--grid", "optim.lr=0.25,0.5,1.0,2.0", "--table"]
    words += ["--json", str(tmp_path / "out.json"), "--", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="run: none of 4 is finished"):
        sweep(words)
    for rate, state in (("0.25", "finished"), ("0.5", "finished"), ("1.0", "preempted")):
        name = f"demo-lr_{rate}"
        options = ["--name", name, "--optim.lr", rate, "--output_dir", str(tmp_path)]
        finish(parse(["demo", *options], show=False).config, state)
    capsys.readouterr()
    sweep(words)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == TABLE
    assert printed.err.splitlines() == [
        "left out: demo-lr_1.0 is preempted",
        "left out: demo-lr_2.0 is not begun",
    ]
    assert sorted(json.loads((tmp_path / "out.json").read_text())) == [
        "demo-lr_0.25", "demo-lr_0.5",
    ]  # fmt: skip


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """Return where a stand-in for sbatch writes its environment and arguments; it is in a cluster.

    The working directory is empty, as `outputs` is written into it.
    """
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$SWEEP" "$@" > {tmp_path}/seen\nexit $FAILS\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.setenv("FAILS", "0")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "seen"


def test_a_sweep_is_submitted_as_one_array_job(fake_sbatch, capsys):
    words = [
        "demo",
        "--grid",
        GRID[0],
        "--sbatch",
        "--nodes=2",
        "--time",
        "60",
        "--",
        "--steps",
        "7",
    ]
    sweep(words)
    file, *arguments = fake_sbatch.read_text().splitlines()
    assert arguments == [
        "--array=1-2", "--nodes=2", "--time", "60", "launch/train.slurm", "demo",
    ]  # fmt: skip
    # The file is where a task of the job finds it, and holds what --print prints.
    assert Path(file).is_absolute()
    assert Path(file).parent == Path("outputs/slurm").resolve()
    lines = Path(file).read_text()
    assert lines.splitlines() == [
        "--steps 7 --optim.lr 1e-3 --metrics.group demo-lr --name demo-lr_1e-3",
        "--steps 7 --optim.lr 4e-3 --metrics.group demo-lr --name demo-lr_4e-3",
    ]
    # Another sweep does not touch the file of one that waits in the queue.
    sweep([*words, "--seed", "1"])
    assert fake_sbatch.read_text().splitlines()[0] != file
    assert Path(file).read_text() == lines


def test_what_sbatch_refuses_is_reported(fake_sbatch, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(ValueError, match="sbatch: refused 2 tasks of "):
        sweep(["demo", "--grid", GRID[0], "--sbatch"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="sbatch: there is none here"):
        sweep(["demo", "--grid", GRID[0], "--sbatch"])


def test_a_word_that_a_line_cannot_hold_is_refused(fake_sbatch):
    for word in ("two words", ""):
        with pytest.raises(ValueError, match=f"options: '{word}' is not one word"):
            sweep(["demo", "--grid", GRID[0], "--sbatch", "--", "--data.input", word])
    assert not fake_sbatch.exists()
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--print", "--nproc_per_node", "2"], "nproc_per_node: 2, nothing is run here"),
        (["--table", "--nproc_per_node", "2"], "nproc_per_node: 2, nothing is run here"),
        (["--sbatch", "--json", "x"], "json: x, there are no losses yet"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        sweep(["demo", "--grid", GRID[0], *words])


def names(*grid, options=()):
    runs = expand("demo", read_grid(grid), options)
    return [parse(["demo", *run], show=False).config.name for run in runs]


def test_a_name_has_no_characters_that_a_run_may_not_have():
    grid = "checkpoint.init_from=outputs/demo,outputs/dense_demo"
    assert names(grid) == ["demo-init_from_outputs_demo", "demo-init_from_outputs_dense_demo"]
    assert names("optim.lr=1e+3") == ["demo-lr_1e_3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2+4", ["2", "4"]),
        ("2", ["2"]),
        ("10+3+7", ["10", "3", "7"]),
        ("0.9+0.95", ["0.9", "0.95"]),
        ("1e+3", ["1e+3"]),
        ("1e+3+2.5E-4", ["1e+3", "2.5E-4"]),
        ("c++", ["c++"]),
        ("a1+2", ["a1+2"]),
        ("+1", ["+1"]),
    ],
)
def test_numbers_joined_by_plus_are_several_words(text, words):
    assert module.words_of(text) == words


def test_a_field_may_hold_several_values(capsys):
    sweep(["demo", "--grid", "early_exit.exits=2+4,2", "--print"])
    first, second = map(shlex.split, capsys.readouterr().out.splitlines())
    group = ["--metrics.group", "demo-exits"]
    assert first == ["--early_exit.exits", "2", "4", *group, "--name", "demo-exits_2_4"]
    assert second == ["--early_exit.exits", "2", *group, "--name", "demo-exits_2"]
    assert parse(["demo", *first], show=False).config.early_exit.exits == (2, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--print", "run: demo-e_scale_-1 cannot be trained: early_exit.e_scale: -1"),
        ("--sbatch", "run: demo-e_scale_-1 cannot be trained: early_exit.e_scale: -1"),
        ("", "run: demo-e_scale_-1 cannot be trained: early_exit.e_scale: -1"),
        ("--print -- --data.seq_len 0", "run: demo-e_scale_0.2 cannot be trained: data.seq_len"),
        ("--nproc_per_node 7", "run: demo-e_scale_0.2 cannot be .* is not a multiple of 7 ranks"),
    ],
)
def test_no_run_starts_where_one_cannot_be_trained(words, message, fake_sbatch, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", None)  # nothing may be started
    with pytest.raises(ValueError, match=message):
        sweep(["demo", "--grid", "early_exit.e_scale=0.2,-1", *words.split()])


def test_a_run_for_more_ranks_than_are_here_is_printed(capsys):
    sweep(["demo", "--grid", "parallel.dp_replicate=2,4", "--print"])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "grid: none is given"),
        (["demo", "--grid", "optim.lr="], "grid: 'optim.lr=' expands to nothing"),
        (["demo", "--grid", "optim.lr=,"], "grid: 'optim.lr=,' expands to nothing"),
        (["demo", "--grid", "optim.lr"], "grid: 'optim.lr' expands to nothing"),
        (["demo", "--grid", "steps=1", "--grid", "steps=2"], "grid: steps is given twice"),
        (["demo", "--grid", "optim.lrr=1"], "option: --optim.lrr does not exist"),
        (["demo", "--grid", "optim.lr=1e-3,1e-3"], "grid: two runs have the name demo-lr_1e-3,"),
        (["demo", "--grid", "checkpoint.init_from=a/b,a_b"], "grid: two runs have the name demo-"),
        (["none", "--grid", "steps=1"], "preset: none does not exist"),
    ],
)
@pytest.mark.parametrize("instead", ["--print", "--sbatch", "--table"])
def test_a_users_error_is_one_line(arguments, message, instead, monkeypatch, capsys):
    assert_one_line(["sweep", *arguments, instead], message, monkeypatch, capsys)


def assert_one_line(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        module.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--bogus"], "options: --bogus are none of the sweep's, see --help"),
        (["demo", "--nodes=2", "--grid", GRID[0]], "options: --nodes=2 are none"),
        (["demo", "--print", "--sbatch"], "sbatch: does not go with --print, choose one"),
        ([], "preset: none, give PRESET"),
    ],
)
def test_options_that_are_not_the_sweeps_are_one_line(arguments, message, monkeypatch, capsys):
    assert_one_line(["sweep", *arguments], message, monkeypatch, capsys)
