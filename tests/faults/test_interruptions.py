"""A stop requested in any way at any time: all ranks stop after the same step, with all saved."""

import json
import os
import signal
import subprocess
import time

import pytest

import train.loop.corpus
from tests.documents import make_documents
from tests.faults.state import events, fingerprint, records
from train.loop.corpus import prepared_path


def status(run):
    return json.loads((run / "status.json").read_text())


MOMENTS = {
    "one rank": [("kill", {"rank": 1, "t": 3, "number": signal.SIGUSR1})],
    "the main rank, three times": [
        ("kill", {"rank": 0, "t": 3, "number": signal.SIGTERM, "times": 3})
    ],
    "all ranks at different steps": [
        ("kill", {"rank": 0, "t": 4, "number": signal.SIGTERM}),
        ("kill", {"rank": 1, "t": 3, "number": signal.SIGUSR1}),
    ],
    "in a save": [("signal_in_save", {"rank": 1, "number": signal.SIGTERM})],
    "in a validation": [("signal_in_validation", {"rank": 0, "number": signal.SIGUSR1})],
    "Ctrl-C": [("kill", {"rank": 0, "t": 3, "number": signal.SIGINT})],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_stops_all_ranks_at_one_step_and_loses_none(launch, undisturbed, moment):
    job = launch(faults=MOMENTS[moment])
    assert job.wait() == [0, 0], job.output
    [stopped] = events(job.run, "preempted")
    assert status(job.run)["state"] == "preempted"
    step = status(job.run)["step"]
    assert 3 < step < 8
    assert stopped["step"] == step
    # The newest checkpoint is of the very step training stopped after, and the only one of it.
    assert fingerprint(job.run)[0] == step
    assert job.output.count(f"checkpoint: wrote {job.run}/checkpoints/step-{step:08d}") == 1
    again = launch()
    assert again.wait() == [0, 0], again.output
    assert f"step {step}\n" in again.output
    assert fingerprint(job.run) == fingerprint(undisturbed)
    assert status(job.run)["state"] == "finished"
    assert [r["step"] for r in records(job.run) if "train/loss" in r] == [2, 4, 6, 8]


def test_a_signal_before_the_first_step_stops_before_it(launch):
    job = launch(faults=[("signal_before_training", {"rank": 1, "number": signal.SIGTERM})])
    assert job.wait() == [0, 0], job.output
    assert status(job.run) | {"time": 0} == {
        "state": "preempted", "step": 0, "saved": 0, "time": 0, "reason": "SIGTERM"
    }  # fmt: skip
    assert not list((job.run / "checkpoints").glob("step-*"))
    assert launch().wait() == [0, 0]
    assert status(job.run)["state"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_preparation_of_a_corpus(launch, tmp_path, monkeypatch, number):
    text, folder = tmp_path / "text.txt", tmp_path / "data"
    text.write_text(" ".join(make_documents(60)))
    monkeypatch.setattr(train.loop.corpus, "PREPARED", folder)
    corpus = prepared_path([str(text)], 320)
    settings = {"data__path": corpus, "data__input": text, "model__vocab_size": 320}
    faults = [("prepare_in", {"folder": str(folder)})]
    signals = ("signal_while_preparing", {"rank": 0, "number": number})
    job = launch(faults=[*faults, signals], **settings)
    assert job.wait() == [0, 0], job.output
    assert status(job.run)["state"] == "preempted"
    assert job.output.count("stopped by") == 1
    assert [*folder.iterdir()] == []
    again = launch(faults=faults, **settings)
    assert again.wait() == [0, 0], again.output
    assert status(job.run)["state"] == "finished"


def test_ranks_whose_launcher_has_died_save_and_stop(launch):
    job = launch(steps=100000, validate__interval_steps=0, checkpoint__interval_steps=0)
    job.wait_for_line("step 4/")
    os.kill(job.leader, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not (job.run / "status.json").exists() or status(job.run)["state"] == "running":
        assert time.monotonic() < deadline, job.output
        time.sleep(0.05)
    assert status(job.run)["reason"] == "the end of the launcher"
    assert fingerprint(job.run)[0] == status(job.run)["step"] > 4


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("torchrun", signal.SIGINT),
        ("the whole group", signal.SIGUSR1),
        pytest.param("torchrun", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("torchrun", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("the whole group", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_torchrun_passes_the_signal_on_and_waits_for_the_checkpoint(training, whom, number):
    process = training.start(
        ranks=2, launcher=["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"],
        name="run", steps=100000, validate__interval_steps=0, checkpoint__interval_steps=0,
    )  # fmt: skip
    run = training.output / "run"
    for line in process.stdout:
        if "step 4/" in line:
            break
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    for pid in [process.pid] + (list(map(int, workers)) if whom == "the whole group" else []):
        os.kill(pid, number)
    output, _ = process.communicate(timeout=60)
    assert status(run)["state"] == "preempted", output
    assert status(run)["reason"] == number.name
    step = status(run)["step"]
    assert fingerprint(run)[0] == step > 4
    # torchrun adds nothing to what rank 0 has printed, and ends as a shell expects it to.
    last = output.splitlines()[-1]
    assert last == f"stopped by {number.name} after step {step}; the same command resumes"
    assert "Traceback" not in output
    assert process.returncode == 128 + number
