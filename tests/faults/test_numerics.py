"""Numbers that go wrong: a bad step reaches no weight, a bad stretch is rolled back and skipped."""

import json

import pytest

from data.shards import NO_LOSS
from tests.faults.conftest import run_once
from tests.faults.state import events, fingerprint, records, tensors

LONG = {
    "steps": 60, "checkpoint__interval_steps": 10, "checkpoint__keep_latest": 0,
    "validate__interval_steps": 0, "metrics__interval_steps": 1,
    "recovery__window_steps": 16, "recovery__spike_score": 5, "recovery__spike_steps": 2,
    "recovery__rollback_steps": 5, "recovery__skip_batches": 20, "recovery__on_spike": "rollback",
}  # fmt: skip
POISON = ("poison", {"first": 40, "stop": 46, "label": 399})


def test_a_loss_that_is_not_finite_on_one_rank_updates_nothing_on_any(launch):
    job = launch(
        faults=[("nan_in_exit", {"rank": 1, "steps": [4], "l": 3})],
        checkpoint__interval_steps=1, checkpoint__keep_latest=0, metrics__interval_steps=1,
    )  # fmt: skip
    assert job.wait() == [0, 0], job.output
    [event] = events(job.run, "update_skipped")
    assert (event["step"], event["rows"]) == (4, [32, 40])
    assert event["found"] == ["rank 1: the loss of the exit after 4 layers is nan"]
    assert (
        "step 5 updates nothing (rows 32 to 39): rank 1: the loss of the exit after 4 layers"
        in job.output
    )

    before, after, next_one = (
        tensors(job.run / "checkpoints" / f"step-{t:08d}") for t in (4, 5, 6)
    )
    assert all((before[name] == after[name]).all() for name in before)
    assert not all((after[name] == next_one[name]).all() for name in before)
    [record] = [r for r in records(job.run) if r["step"] == 5]
    assert record["progress/skipped_updates"] == 1
    assert "train/loss" not in record


def test_an_infinite_gradient_or_a_batch_without_a_label_updates_nothing(launch):
    no_label = ("poison", {"first": 6, "stop": 7, "label": NO_LOSS})
    job = launch(
        faults=[("infinite_gradient", {"rank": 0, "t": 4}), no_label],
        checkpoint__interval_steps=1, checkpoint__keep_latest=0, metrics__interval_steps=1,
    )  # fmt: skip
    assert job.wait() == [0, 0], job.output
    infinite, empty = events(job.run, "update_skipped")
    assert (infinite["step"], empty["step"]) == (4, 6)
    assert infinite["found"] == ["every loss is finite, but the gradient is not"]
    assert "no token of the batch has a label" in empty["found"][0]
    before, after = (tensors(job.run / "checkpoints" / f"step-{t:08d}") for t in (6, 7))
    assert all((before[name] == after[name]).all() for name in before)
    [record] = [r for r in records(job.run) if r["step"] == 7]
    assert record["progress/skipped_updates"] == 1
    assert "train/loss" not in record


def test_a_run_with_a_skipped_update_replays_bit_for_bit(launch):
    faults = [("nan_in_exit", {"rank": 0, "steps": [4], "l": 3})]
    straight = launch(name="straight", faults=faults)
    assert straight.wait() == [0, 0], straight.output
    killed = launch(faults=[*faults, ("kill", {"rank": 1, "t": 6})])
    assert -9 in killed.wait()
    again = launch(faults=faults)
    assert again.wait() == [0, 0], again.output
    assert fingerprint(again.run) == fingerprint(straight.run)


def test_bad_steps_in_a_row_roll_back_past_their_batches(launch):
    job = launch(
        faults=[("nan_in_exit", {"rank": 1, "steps": [24, 25, 26], "l": 3})],
        **LONG | {"recovery__max_skipped_updates": 3},
    )
    # The fault comes again at the same steps, whatever the batches: three times, then it is enough.
    assert job.wait(120) == [2, 2], job.output
    rollbacks = events(job.run, "rollback")
    assert [r["to"] for r in rollbacks] == [10, 10, 10]
    assert rollbacks[0]["skipped_rows"] == [80, 240]
    assert "error: recovery.max_rollbacks: 3 are used up" in job.output


@pytest.fixture(scope="module")
def poisoned(launcher, corpus, tmp_path_factory):
    """Return a run that met the poisoned batches, and went back."""
    folder = tmp_path_factory.mktemp("poisoned")
    job, statuses = run_once(launcher, corpus, folder, [POISON], timeout=120, **LONG)
    assert statuses == [0, 0], job.output
    return job.run


def test_a_spike_rolls_back_and_the_rest_is_as_if_its_batches_had_never_been(
    launch, training, poisoned
):
    [rollback] = events(poisoned, "rollback")
    assert rollback["reason"].startswith("loss spike")
    assert rollback["to"] == 30
    assert rollback["skipped_rows"] == [8 * 30, 8 * 50]
    assert [r["step"] for r in records(poisoned) if "train/loss" in r] == list(range(1, 61))
    # A run that skips those batches from the start.
    never = training.output / "never"
    never.mkdir(parents=True)
    (never / "events.jsonl").write_text(json.dumps(rollback) + "\n")
    straight = launch(name="never", **LONG)
    assert straight.wait(120) == [0, 0], straight.output
    assert fingerprint(straight.run) == fingerprint(poisoned)


def test_a_rolled_back_run_that_is_killed_remembers_what_it_must_not_read(launch, poisoned):
    killed = launch(faults=[POISON], **LONG)
    killed.wait_for_line("skipping the rows")
    killed.kill()
    killed.wait()
    again = launch(faults=[POISON], **LONG)
    assert again.wait(120) == [0, 0], again.output
    assert fingerprint(again.run) == fingerprint(poisoned)
    assert len(events(again.run, "rollback")) == 1


def test_a_spike_is_only_logged_where_that_is_configured(launch):
    job = launch(faults=[POISON], **LONG | {"recovery__on_spike": "warn"})
    assert job.wait(120) == [0, 0], job.output
    assert not events(job.run, "rollback")
    assert len(events(job.run, "anomaly")) >= 1


def test_the_edges_of_the_curriculum_and_the_schedules_alone_are_no_spike(launch):
    for C, name in (("grad", "gradual"), ("rot", "rotating")):
        job = launch(name=name, curriculum__C=C, optim__lr=3e-2, **LONG)
        assert job.wait(120) == [0, 0], job.output
        assert not events(job.run, "anomaly"), job.output


def test_a_run_that_diverges_from_the_start_ends_with_the_reason(launch):
    job = launch(
        ranks=1, steps=40, optim__lr=1e30, optim__warmup_steps=0, checkpoint__interval_steps=50
    )
    assert job.wait() == [2], job.output
    assert "10 steps in a row were not finite" in job.output
    assert "no checkpoint from before step 1 to roll back to" in job.output
    assert json.loads((job.run / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("rank", [0, 3])
def test_a_flipped_bit_in_a_replica_is_found_and_named(launch, rank):
    job = launch(
        ranks=4, parallel__dp_replicate=2, faults=[("flip_bit", {"rank": rank, "t": 2})],
        replica_check__interval_steps=1, data__microbatch_size=1,
    )  # fmt: skip
    assert all(job.wait()), job.output
    assert "layers.1.feed_forward.w1.weight" in job.output
    assert str(rank) in job.output
