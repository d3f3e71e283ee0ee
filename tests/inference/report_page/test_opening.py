"""A report reads what earlier commands wrote, of the same checkpoint alone."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from inference import benchmark, evaluate
from inference.engine.sampling import Sampling
from inference.evaluation.measurement import Workload
from inference.loading.run import load_run
from inference.loading.tuned import Tuned, conditions_of, tuned_path, write_tuned
from inference.report_page import opening
from inference.report_page.measuring import measure_speeds
from inference.report_page.opening import find_arms, find_exits, find_tuning, reports_folder


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory):
    """A run with the files of evaluate and benchmark in its reports."""
    folder = tmp_path_factory.mktemp("opening") / "run"
    shutil.copytree(run_folder, folder)
    reports = folder / "reports"
    common = ["--run", folder, "--json"]
    commands = [
        (evaluate, [*common, reports / "exits.json", "--max_tokens", 100]),
        (
            benchmark,
            [*common, reports / "speed.json", "--prompts", 1, "--prompt_tokens", 8]
            + ["--max_new_tokens", 8, "--repeats", 2],
        ),
    ]
    for command, words in commands:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["command", *map(str, words)])
            command.main()
    return load_run(folder, device="cpu")


def exits_of(run):
    return find_exits(run, "name", None, max_tokens=100)


def test_exits_and_strategies_are_read_where_they_are_of_this_step(run, monkeypatch):
    monkeypatch.setattr(opening, "evaluate_run", None)
    exits = exits_of(run)
    assert [q.E for q in exits.exits] == [1, 2, 3, 4]
    assert "read from exits.json" in exits.source.how
    assert exits.source.date
    arms = find_arms(run, None)
    assert arms.arms[0].strategy == "autoregressive"
    assert arms.repeats == 2
    assert "read from speed.json" in arms.source.how
    assert "torch" in arms.source.machine


def test_files_of_another_step_are_left_out(run, capsys):
    reports = reports_folder(run.checkpoint)
    for name in ("exits.json", "speed.json"):
        path = reports / name
        before = path.read_text()
        path.write_text(before.replace('"step": 7', '"step": 8'))
        try:
            if name == "exits.json":
                assert "read from" not in exits_of(run).source.how
            else:
                assert find_arms(run, None) is None
                assert find_arms(run, path) is not None, "a file that is named is taken"
        finally:
            path.write_text(before)
    assert capsys.readouterr().err.count("of step 8") == 2


def test_costs_come_from_what_tune_kept_and_else_are_measured(run, capsys):
    assert find_tuning(run) is None
    prompt = [[run.tokenizer.bos_id, *run.tokenizer.encode("the cat sat")]]
    workload = Workload(prompts=prompt, max_new_tokens=6, batch_size=1, sampling=Sampling(), seed=0)
    tuning, arms = measure_speeds(run, workload, repeats=1, tuning=None)
    assert {p.E for p in tuning.predictions} == {1, 2, 3}
    assert arms.arms[0].strategy in tuning.rounds
    found = {
        "costs": asdict(tuning.costs),
        "predictions": [asdict(p) | {"speedup": p.speedup} for p in tuning.predictions],
        "rounds": tuning.rounds,
        "machine": {"cpu": "a processor", "date": "2026-01-02T03:04"},
    }
    tuned = Tuned(
        strategy=None, conditions=conditions_of(run, batch_size=1, quantize=None, temperature=0.0)
    )
    write_tuned(run, None, tuned, found)
    read = find_tuning(run)
    assert read.costs == tuning.costs
    assert read.predictions == tuning.predictions
    assert (read.source.machine, read.source.date) == ("a processor", "2026-01-02")
    write_tuned(run, None, tuned, found | {"costs": {}})
    assert find_tuning(run) is None
    tuned_path(run).write_text("{")
    assert find_tuning(run) is None
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [
        ("runs/demo/checkpoints/step-00000500", "runs/demo/reports"),
        ("models/converted", "models/converted.reports"),
    ],
)
def test_reports_never_lie_in_a_checkpoint(checkpoint, folder):
    assert reports_folder(Path(checkpoint)) == Path(folder)
