"""Ranks that die at any moment: the same command again ends in the same state, bit for bit."""

import json
import random
import re
import time

import pytest

from tests.faults.state import events, fingerprint, records
from tests.training import ROOT


def status(run):
    return json.loads((run / "status.json").read_text())


def test_a_rank_killed_in_a_step_costs_the_steps_since_the_last_checkpoint(launch, undisturbed):
    job = launch(faults=[("kill", {"rank": 1, "t": 5})])
    assert -9 in job.wait()
    assert status(job.run)["state"] == "interrupted"
    assert (status(job.run)["step"], status(job.run)["saved"]) == (5, 3)
    again = launch()
    assert again.wait() == [0, 0], again.output
    assert "resuming from" in again.output
    assert "step-00000003" in again.output
    assert fingerprint(job.run) == fingerprint(undisturbed)
    assert [r["step"] for r in records(job.run) if "train/loss" in r] == [2, 4, 6, 8]
    assert len(events(job.run, "start")) == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "state"),
    [("ValueError", "failed"), ("MemoryError", "failed"), ("RuntimeError", "interrupted"),
     ("ConnectionResetError", "interrupted")],
)  # fmt: skip
def test_what_fails_decides_the_status_and_not_which_rank(launch, rank, kind, state):
    fault = {"rank": rank, "t": 5, "kind": kind, "text": "of this rank"}
    job = launch(faults=[("fail", fault)])
    statuses = job.wait()
    assert (2 in statuses) == (state == "failed"), job.output
    found = status(job.run)
    assert (found["state"], found["step"], found["saved"]) == (state, 5, 3), job.output
    if state == "failed":  # whatever the other rank makes of it
        assert found["reason"] == f"{kind}: of this rank"
        assert [e["reason"] for e in events(job.run, "failed")] == [found["reason"]]


def test_torchrun_restarts_a_killed_rank_exactly_once(training, undisturbed, tmp_path):
    faults = [("kill_once", {"rank": 1, "t": 5, "marker": str(tmp_path / "once")})]
    status, output = training.run(
        ranks=2, launcher=["--max-restarts", "3"], name="run",
        script="tests/faults/run_with_faults.py",
        environment={"FAULTS": json.dumps(faults), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert status == 0, output
    run = training.output / "run"
    assert len(events(run, "start")) == 2, output
    assert fingerprint(run) == fingerprint(undisturbed)


def test_kills_at_random_moments_end_in_the_same_state(launch):
    check_random_kills(launch, seed=0, steps=24, kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_chaos(launch, seed):
    check_random_kills(launch, seed, steps=120, kills=25)


def check_random_kills(launch, seed, *, steps, kills):
    draw = random.Random(seed)
    settings = {
        "steps": steps, "checkpoint__interval_steps": 2, "validate__interval_steps": 7,
        "metrics__interval_steps": 1, "checkpoint__asynchronous": draw.random() < 0.5,
    }  # fmt: skip
    straight = launch(name="straight", **settings)
    assert straight.wait(120) == [0, 0], straight.output
    seconds = []
    for _ in range(kills):
        begin = time.monotonic()
        job = launch(**settings)
        job.wait_for_line("step ")
        time.sleep(draw.uniform(0, 0.6))
        job.kill()
        job.wait()
        seconds.append(time.monotonic() - begin)
        if re.search(rf"step {steps}/", job.output):
            break
    job = launch(**settings)
    assert job.wait(120) == [0, 0], job.output
    assert fingerprint(job.run) == fingerprint(straight.run)
    steps_logged = [r["step"] for r in records(job.run) if "train/loss" in r]
    assert steps_logged == list(range(1, steps + 1))
