"""launch/train.slurm on a real SLURM of two nodes: its time runs out, it fails, it is a sweep."""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.state import fingerprint
from tests.training import ROOT, Training
from train.loop.corpus import prepared_path
from train.run_folder.run_lock import acquire

TWO_NODES = ("--nodes=2", "--cpus-per-task=1", "--mem=0")


@pytest.fixture
def sbatch(slurm, corpus, tmp_path):
    """Return sbatch(options, name=..., **overrides) -> (job number, run folder, log)."""
    training = Training(corpus, tmp_path / "outputs")
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"

    def submit(options, *, environment=None, name="run", **overrides):
        log = tmp_path / f"{name}.log"
        number = slurm.submit(
            *TWO_NODES, f"--output={log}", *options, "launch/train.slurm",
            *training.arguments(name=name, **overrides),
            PATH=path, RANKS="1", OMP_NUM_THREADS="1", **(environment or {}),
        )  # fmt: skip
        status_files.append(ROOT / "outputs" / "slurm" / f"{number}.json")
        return number, training.output / name, log

    status_files = []
    yield submit
    for path in status_files:
        path.unlink(missing_ok=True)
        path.with_suffix(".stalls").unlink(missing_ok=True)


def status(run):
    return json.loads((run / "status.json").read_text())


def process_of(job, command, *settings):
    """Return a process of a job whose command line and environment hold these, if it is there."""
    wanted = {setting.encode() for setting in (f"SLURM_JOB_ID={job}", *settings)}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if command.encode() in (folder / "cmdline").read_bytes() and wanted <= {
                *(folder / "environ").read_bytes().split(b"\0")
            }:
                return int(folder.name)
    return None


def process_of_rank(job, rank):
    return process_of(job, "train/main.py", f"RANK={rank}")


@pytest.mark.timeout(500)
@pytest.mark.parametrize("warned", ["by hand", pytest.param("by SLURM", marks=pytest.mark.slow)])
def test_a_job_requeues_itself_before_its_time_limit_and_goes_on_until_it_is_finished(
    slurm, sbatch, tmp_path, warned
):
    # Its time is up long before its steps are done; once it is requeued, few are left.
    sweep = tmp_path / "options.txt"
    sweep.write_text("--steps 100000\n")
    # SLURM's warning comes at once: a third of the limit is trained all the same.
    limit = ("--time=6", "--signal=B:USR1@355") if warned == "by SLURM" else ()
    number, run, log = sbatch(
        ("--array=1-1", *limit), environment={"SWEEP": str(sweep)}, validate__interval_steps=0,
        checkpoint__interval_steps=0, metrics__interval_steps=20, metrics__tensorboard=False,
    )  # fmt: skip
    if warned == "by hand":
        slurm.wait_until((run / "metrics.jsonl").exists, 150)
        os.kill(process_of(number, "slurm_script"), signal.SIGUSR1)
    slurm.wait_until(lambda: slurm.state(f"{number}_1")[1] == 1, 200)
    reached = status(run)["step"]
    sweep.write_text(f"--steps {reached + 30} --checkpoint.allow_config_changes True\n")
    state, restarts = slurm.wait(f"{number}_1", 150)
    text = log.read_text()
    assert state == "COMPLETED", text
    assert f"preempted, {reached} steps done, {reached} saved, 0 before" in text
    assert f"finished, {reached + 30} steps done" in text
    assert ("its time limit is 360 s, stops in " in text) == (warned == "by SLURM")
    # A planned stop looks like one.
    assert "Traceback" not in text
    assert "Exited with" not in text
    assert "srun: error" not in text
    # No step is done twice: each start goes on from where the one before was stopped.
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events = [e for e in events if e["kind"] != "straggler"]  # on a busy machine there are some
    assert [e["kind"] for e in events] == ["start", "preempted"] * restarts + ["start", "finish"]
    starts = [e["step"] for e in events if e["kind"] == "start"]
    assert starts == [0, *(e["step"] for e in events if e["kind"] == "preempted")]


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"curriculum__R": 0}, "error: curriculum.R: 0"),  # met before srun
        ({"checkpoint__init_from": "/no/such"}, "error: checkpoint.init_from: "),  # met by rank 0
    ],
)
def test_a_job_that_fails_for_good_is_not_requeued(slurm, sbatch, setting, error):
    number, run, log = sbatch((), **setting)
    state, restarts = slurm.wait(number, 120)
    text = log.read_text()
    assert (state, restarts) == ("FAILED", 0), text
    assert text.splitlines()[-1].startswith(error), text
    assert "Traceback" not in text
    assert text.count("error: ") < 6, text  # once by the rank, once by the script, and srun's


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


WHOM = {
    "its worker": lambda rank: [rank],
    "its torchrun": lambda rank: [parent_of(rank)],
    "both": lambda rank: [parent_of(rank), rank],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "whom", "restarts"),
    [
        (1, "its worker", 0), (1, "its worker", 3), (1, "its torchrun", 3), (1, "both", 3),
        (1, "both", 0), (0, "its worker", 0), (0, "its worker", 3), (0, "both", 3),
    ],
)  # fmt: skip
@pytest.mark.timeout(400)
def test_a_rank_that_dies_for_good_costs_a_restart_whichever_it_is(
    slurm, sbatch, launch, rank, whom, restarts
):
    settings = {
        "steps": 300,
        "checkpoint__interval_steps": 30,
        "validate__interval_steps": 0,
        "metrics__interval_steps": 30,
    }
    straight = launch(name="straight", **settings)
    assert straight.wait(120) == [0, 0], straight.output
    number, run, log = sbatch((), environment={"MAX_RESTARTS": str(restarts)}, **settings)
    slurm.wait_until(lambda: [*run.glob("checkpoints/step-????????/manifest.json")], 120)
    for pid in WHOM[whom](process_of_rank(number, rank)):
        os.kill(pid, signal.SIGKILL)
    state, requeues = slurm.wait(number, 250)
    text = log.read_text()
    assert state == "COMPLETED", text
    assert requeues == (0 if whom == "its worker" and restarts else 1), text
    assert fingerprint(run) == fingerprint(straight.run)
    assert status(run)["saved"] == 300


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_that_dies_twice_before_its_first_checkpoint_ends(slurm, sbatch):
    settings = {"steps": 100000, "checkpoint__interval_steps": 0, "validate__interval_steps": 0}
    number, run, log = sbatch((), environment={"MAX_RESTARTS": "0"}, **settings)
    for start in (1, 2):
        slurm.wait_until(
            lambda start=start: log.exists() and log.read_text().count("4/100000") == start, 150
        )
        os.kill(process_of_rank(number, 1), signal.SIGKILL)
        if start == 1:
            slurm.wait_until(lambda: slurm.state(number)[1] == 1, 60)
            slurm.hurry(number)
    assert slurm.wait(number, 60) == ("FAILED", 1)
    last = log.read_text().splitlines()[-1]
    assert last == f"error: job {number} has ended 2 times without a new checkpoint, not requeued"
    assert status(run)["saved"] == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_signal_while_the_corpus_is_prepared_stops_and_requeues(slurm, sbatch):
    corpus = prepared_path(["embedded"], 400)
    number, run, log = sbatch((), data__path=corpus, data__input="embedded", model__vocab_size=400)
    folder, name = ROOT / corpus.parent, corpus.name
    slurm.wait_until(lambda: [*folder.glob(f".{name}.partial-*/tokenizer.model")], 200)
    slurm.call("scancel", "--batch", "--signal=USR1", number)
    slurm.wait_until(lambda: slurm.state(number)[1] == 1, 120)
    slurm.call("scancel", number)
    text = log.read_text()
    assert "stopped by SIGUSR1 before the first step" in text
    assert "preempted, 0 steps done, 0 saved, 0 before" in text
    assert not [word for word in ("Traceback", "killed", "Exited with") if word in text], text
    assert status(run)["state"] == "preempted"
    assert not [*folder.glob(f"*{name}*")]


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
    # Submitted again while another job trains one of them, that one is left out.
    lock = acquire(run.with_name("low"), "another job")
    try:
        number, _, _ = sbatch(
            ("--array=1-1", "--nodes=1", "--output=%x-%j.log", f"--chdir={ROOT}"),
            environment={"SWEEP": str(sweep)},
        )
        assert slurm.wait(f"{number}_1", 90)[0] == "COMPLETED"
    finally:
        lock.release()
    log = ROOT / f"skipstone-{number}_1.log"
    first, *_, last = log.read_text().splitlines()
    log.unlink()
    assert first.startswith(f"== job {number}_1 on n")
    assert first.endswith("--name low --optim.lr 1e-4")
    assert last == f"== job {number}_1: left out, another job trains this run"
    assert not [*ROOT.glob("skipstone-*.log")]
