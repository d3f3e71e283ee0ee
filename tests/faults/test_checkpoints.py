"""Checkpoints cut off, damaged, forged or without room: what a run goes on from, and how it ends.

Where the ranks stay as many, it ends with the same weights and moments as one left in peace.
"""

import os
import pickle
import shutil

import pytest

from models.checkpoint_format import checkpoint_steps, verify
from tests.faults.conftest import run_once
from tests.faults.state import fingerprint, records
from tests.models.test_checkpoint_format import rewrite_metadata


@pytest.fixture(scope="module")
def interrupted(launcher, corpus, tmp_path_factory):
    """Return a run that was killed after its checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("interrupted")
    faults = [("kill", {"rank": 0, "t": 7})]
    run_once(launcher, corpus, folder, faults, checkpoint__asynchronous=False)
    assert list(checkpoint_steps(folder / "run" / "checkpoints")) == [3, 6]
    return folder / "run"


@pytest.fixture
def run(interrupted, tmp_path):
    """Return a copy of it, in the folder that `launch` goes on in, to be damaged."""
    return shutil.copytree(interrupted, tmp_path / "outputs" / "run")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("point", "rank"), [("shard", 1), ("manifest", 0), ("rename", 0)])
def test_a_kill_while_writing_leaves_the_checkpoint_before(
    launch, undisturbed, point, rank, asynchronous
):
    kill = ("kill_in_checkpoint", {"rank": rank, "step": 6, "point": point})
    job = launch(faults=[kill], checkpoint__asynchronous=asynchronous)
    assert job.wait()[rank] == -9, job.output
    assert names(job.run) == ["step-00000003", "step-00000006.tmp"]
    again = launch(checkpoint__asynchronous=asynchronous)
    assert again.wait() == [0, 0], again.output
    assert "step-00000003, step 3" in again.output
    assert names(job.run) == ["step-00000003", "step-00000006", "step-00000008"]
    assert fingerprint(job.run) == fingerprint(undisturbed)


def test_kills_while_writing_one_after_the_other(launch, undisturbed):
    deaths = [(1, 3, "shard"), (0, 3, "manifest"), (0, 6, "rename"), (0, 6, "shard")]
    for rank, step, point in deaths:
        kill = ("kill_in_checkpoint", {"rank": rank, "step": step, "point": point})
        job = launch(faults=[kill])
        assert job.wait()[rank] == -9, job.output
    job = launch()
    assert job.wait() == [0, 0], job.output
    assert names(job.run) == ["step-00000003", "step-00000006", "step-00000008"]
    assert fingerprint(job.run) == fingerprint(undisturbed)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit, truncate, remove])
def test_a_damaged_shard_sends_the_run_to_the_checkpoint_before(launch, undisturbed, run, damage):
    damage(run / "checkpoints" / "step-00000006" / "__1_0.distcp")
    job = launch()
    assert job.wait() == [0, 0], job.output
    assert job.output.count("__1_0.distcp is") == 1, job.output
    assert "step-00000003, step 3" in job.output
    assert "step-00000006.damaged" in names(run)
    assert fingerprint(run) == fingerprint(undisturbed)


def test_when_every_checkpoint_is_damaged_the_run_stops(launch, run):
    for step in (3, 6):
        flip_bit(run / "checkpoints" / f"step-0000000{step}" / "__0_0.distcp")
    before = (run / "metrics.jsonl").read_bytes()
    job = launch()
    assert job.wait() == [2, 2], job.output
    assert job.output.count("error: ") == 1, job.output
    assert "none of the 2 in" in job.output
    assert names(run) == ["step-00000003", "step-00000006"]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_forged_metadata_runs_nothing_and_stops_the_run(launch, run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    rewrite_metadata(run / "checkpoints" / "step-00000006", pickle.dumps(Evil()))
    job = launch()
    assert job.wait() == [2, 2], job.output
    assert job.output.count("error: ") == 1, job.output
    assert "names posix.system, which is not allowed" in job.output
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_survived(launch, undisturbed, asynchronous):
    job = launch(
        faults=[("full_disk", {"rank": 1, "steps": [3]})], checkpoint__asynchronous=asynchronous
    )
    assert job.wait() == [0, 0], job.output
    assert job.output.count("could not write step-00000003") == 1, job.output
    assert "training continues (1 of at most 3 failures in a row)" in job.output
    assert names(job.run) == ["step-00000006", "step-00000008"]
    assert fingerprint(job.run) == fingerprint(undisturbed)


@pytest.mark.parametrize(("steps", "asynchronous"), [([6, 7], False), ([6, 7], True), ([8], True)])
def test_a_disk_that_stays_full_stops_the_run(launch, undisturbed, steps, asynchronous):
    settings = {"checkpoint__max_failures": 2, "checkpoint__asynchronous": asynchronous}
    if steps != [8]:  # the last one may not fail even once
        settings["checkpoint__interval_steps"] = 1
    job = launch(faults=[("full_disk", {"rank": 1, "steps": steps})], **settings)
    assert job.wait() == [2, 2], job.output
    [line] = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert f"could not write step-0000000{steps[-1]}" in line
    good = checkpoint_steps(job.run / "checkpoints")
    assert list(good) == ([3, 4, 5] if steps != [8] else [3, 6])
    assert verify(good[max(good)]).step == max(good)
    # With room again, the same command goes on.
    again = launch(**settings)
    assert again.wait() == [0, 0], again.output
    assert fingerprint(job.run) == fingerprint(undisturbed)


def test_the_ranks_may_be_other_ones_after_every_kill(launch, undisturbed):
    stages = [
        (4, 4, {"parallel__dp_replicate": 2}),
        (2, 7, {"parallel__shard": "none"}),
        (1, None, {}),
    ]
    settings = {"checkpoint__asynchronous": False, "metrics__interval_steps": 1}
    for ranks, killed_at, mesh in stages:
        faults = [("kill", {"rank": 0, "t": killed_at})] if killed_at else []
        job = launch(ranks=ranks, faults=faults, **settings, **mesh)
        statuses = job.wait()
    assert statuses == [0], job.output
    assert "step-00000006, step 6" in job.output
    found, expected = (
        [record["train/loss"] for record in records(run) if "train/loss" in record]
        for run in (job.run, undisturbed)
    )
    # The same batches; sums over other numbers of ranks round otherwise.
    assert found == pytest.approx(expected, rel=1e-5)


def test_another_configuration_is_refused_unless_it_is_meant(launch, run):
    job = launch(optim__lr=1e-3, steps=9, metrics__interval_steps=1)
    assert job.wait() == [2, 2], job.output
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1].strip() for error in errors] == ["optim.lr"]
    assert names(run) == ["step-00000003", "step-00000006"]
    job = launch(optim__lr=1e-3, steps=9, checkpoint__allow_config_changes=True)
    assert job.wait() == [0, 0], job.output
    assert "config: optim.lr was 0.003, is 0.001 from step 6 on" in job.output
