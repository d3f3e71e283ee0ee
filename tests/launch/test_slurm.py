"""launch/train.slurm on a real SLURM of two nodes: its time runs out, it fails, it is a sweep."""

import json
import sys
from pathlib import Path

import pytest

from tests.training import ROOT, Training

TWO_NODES = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")


@pytest.fixture
def sbatch(slurm, corpus, tmp_path):
    """Return sbatch(options, name=..., **overrides) -> (job number, run folder, log)."""
    training = Training(corpus, tmp_path / "outputs")
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"

    def submit(options, *, environment=None, name="run", **overrides):
        log = tmp_path / f"{name}.log"
        number = slurm.submit(
            *TWO_NODES, *options, f"--output={log}", "launch/train.slurm",
            *training.arguments(name=name, **overrides),
            PATH=path, RANKS="1", OMP_NUM_THREADS="1", **(environment or {}),
        )  # fmt: skip
        status_files.append(ROOT / "outputs" / "slurm" / f"{number}.json")
        return number, training.output / name, log

    status_files = []
    yield submit
    for path in status_files:
        path.unlink(missing_ok=True)


def status(run):
    return json.loads((run / "status.json").read_text())


@pytest.mark.timeout(400)
def test_a_job_requeues_itself_at_its_time_limit_and_goes_on_until_it_is_finished(
    slurm, sbatch, tmp_path
):
    # Its time is up long before its steps are done; once it is requeued, few are left.
    sweep = tmp_path / "options.txt"
    sweep.write_text("--steps 100000\n")
    options = ("--array=1-1", "--time=2", "--signal=B:USR1@80")
    number, run, log = sbatch(
        options, environment={"SWEEP": str(sweep)}, validate__interval_steps=0,
        checkpoint__interval_steps=0, metrics__interval_steps=20, metrics__tensorboard=False,
    )  # fmt: skip
    slurm.wait_until(lambda: slurm.state(f"{number}_1")[1] == 1, 150)
    reached = status(run)["step"]
    sweep.write_text(f"--steps {reached + 30} --checkpoint.allow_config_changes True\n")
    state, restarts = slurm.wait(f"{number}_1", 150)
    text = log.read_text()
    assert state == "COMPLETED", text
    assert f"preempted, {reached} steps done, 0 before" in text
    assert f"finished, {reached + 30} steps done" in text
    # No step is done twice: each start goes on from where the one before was stopped.
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events = [e for e in events if e["kind"] != "straggler"]  # on a busy machine there are some
    assert [e["kind"] for e in events] == ["start", "preempted"] * restarts + ["start", "finish"]
    starts = [e["step"] for e in events if e["kind"] == "start"]
    assert starts == [0, *(e["step"] for e in events if e["kind"] == "preempted")]


def test_a_job_that_fails_for_good_is_not_requeued(slurm, sbatch):
    number, run, log = sbatch(("--nodes=1",), curriculum__R=0)
    state, restarts = slurm.wait(number, 60)
    assert (state, restarts) == ("FAILED", 0)
    assert "error: curriculum.R: 0" in log.read_text()
    assert "not requeued" in log.read_text()


def test_each_task_of_an_array_job_trains_its_line_of_the_sweep(slurm, sbatch, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--name low --optim.lr 1e-4\n--name high --optim.lr 1e-2\n")
    number, run, log = sbatch(
        ("--array=1-2", "--nodes=1"), environment={"SWEEP": str(sweep)}, steps=2
    )
    for task in (1, 2):
        assert slurm.wait(f"{number}_{task}", 90)[0] == "COMPLETED", log.read_text()
    for name, lr in (("low", 1e-4), ("high", 1e-2)):
        config = json.loads((run.with_name(name) / "config.json").read_text())
        assert config["optim"]["lr"] == lr
