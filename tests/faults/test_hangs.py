"""A rank that hangs is named in bounded time, the job ends, and the run resumes from there."""

import signal

import pytest

from tests.faults.state import events, fingerprint


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (("hang", {"rank": 1, "t": 4}), "rank 1 is in step of step 4"),
        # Its last heartbeat is of setup, which may take an hour.
        (("kill", {"rank": 1, "t": 0, "number": signal.SIGSTOP}), "rank 1 is frozen"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_job_ends(launch, fault, reason):
    job = launch(faults=[fault], runtime__timeout_seconds=3)
    statuses = job.wait()
    assert all(statuses), job.output
    assert reason in job.output
    [event] = events(job.run, "hang")
    assert reason in event["reason"]
    stacks = list((job.run / "hangs").iterdir())
    assert stacks
    assert all("run_steps" in path.read_text() for path in stacks)
    again = launch(steps=8)
    assert again.wait() == [0, 0], again.output
    assert fingerprint(job.run)[0] == 8


def test_two_jobs_cannot_write_one_run(launch):
    first = launch(steps=100000, validate__interval_steps=0)
    first.wait_for_line("step 2/")
    second = launch()
    assert second.wait() == [2, 2], second.output
    assert str(first.pids[0]) in second.output
    first.kill()
    first.wait()
    third = launch(steps=100000, validate__interval_steps=0)
    third.wait_for_line("recovered")
    third.wait_for_line("grad norm")


def test_a_straggler_is_named_with_its_section_and_line(launch):
    job = launch(
        faults=[("slow_loader", {"rank": 1, "seconds": 0.8})], steps=15,
        validate__interval_steps=0, stragglers__interval_steps=5, stragglers__min_share=0.0,
    )  # fmt: skip
    assert job.wait() == [0, 0], job.output
    # Other sections may be slow on a busy machine, on any rank; the loader alone waits in data.
    reasons = [event["reason"] for event in events(job.run, "straggler")]
    reasons = [text for text in reasons if "is slow in data" in text]
    assert reasons, job.output
    assert all("rank 1 is slow in data" in text for text in reasons)
