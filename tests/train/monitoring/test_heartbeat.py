import pytest
import torch.distributed as dist

from train.monitoring.heartbeat import (
    HangReport,
    Heartbeat,
    HeartbeatAges,
    HeartbeatStore,
    diagnose_hang,
)

LIMITS = dict.fromkeys(("data", "step", "log", "validate"), 10) | {"setup": 60, "checkpoint": 60}


def reading(*positions, count):
    """Make heartbeats of ranks at (t, section, seconds), with their counts."""
    return [
        at and Heartbeat(count[rank] if isinstance(count, list) else count, section, t, seconds)
        for rank, at in enumerate(positions)
        for t, section, seconds in [at or (0, "setup", 0.0)]
    ]


def diagnose(*positions, counts=None, apart=3):
    times = iter((100, 100 + apart))
    ages = HeartbeatAges(lambda: next(times))
    ages.update(reading(*positions, count=4))
    last = reading(*positions, count=counts or 7)
    return diagnose_hang(last, ages.update(last), LIMITS)


def test_the_rank_in_an_earlier_step_hangs():
    found = diagnose((7, "step", 11), (6, "log", 12), (7, "step", 11))
    assert found.text == "rank 1 is in log of step 6 for 12 s; the others are in step of step 7"
    assert found.silent == ()


def test_within_a_step_the_earlier_section_hangs():
    found = diagnose((7, "step", 11), (7, "step", 11), (7, "data", 12), (7, "data", 13))
    assert found.text == (
        "ranks 2, 3 are in data of step 7 for 12 s; the others are in step of step 7"
    )


def test_ranks_that_all_are_in_one_section_wait_for_each_other():
    found = diagnose((3, "step", 13), (3, "step", 12))
    assert found.text == "all 2 ranks are in step of step 3 for 12 s, each waiting for another"
    assert diagnose((3, "data", 11)).text == "rank 0 is in data of step 3 for 11 s"


def test_of_ranks_in_one_section_those_that_do_not_wait_hang():
    # On GPUs: rank 1 has not launched what the devices of the others wait for.
    beats = [Heartbeat(7, "step", 3, 12, waits=rank != 1) for rank in range(3)]
    found = diagnose_hang(beats, [0, 0, 0], LIMITS)
    assert found.text == "rank 1 is in step of step 3 for 12 s; the others wait for it"


def test_a_rank_without_a_new_heartbeat_is_frozen_wherever_it_stands():
    found = diagnose((7, "step", 11), (7, "step", 3), (6, "data", 11), counts=[7, 4, 7])
    assert found == HangReport(
        "rank 1 is frozen, without a heartbeat, last seen in step of step 7 for 3 s", (1,)
    )
    found = diagnose((7, "step", 61), None, counts=[7, 7])
    assert found == HangReport("rank 1 is frozen, without a heartbeat, never seen", (1,))


def test_a_rank_may_keep_the_others_waiting_for_its_own_limit():
    # Rank 0 deletes old checkpoints, which may take 60 s; the others wait in the next step.
    assert diagnose((7, "checkpoint", 59), (8, "step", 30)) is None
    assert "rank 0 is in checkpoint" in diagnose((7, "checkpoint", 61), (8, "step", 30)).text
    # The same where rank 0 is too busy to beat.
    assert diagnose((7, "checkpoint", 5), (8, "step", 59), counts=[4, 7]) is None
    assert "rank 0 is frozen" in diagnose((7, "checkpoint", 5), (8, "step", 61), counts=[4, 7]).text


def test_a_rank_frozen_for_the_time_of_a_step_has_left_the_longer_section_it_was_seen_in():
    early = (0, "setup", 0), (4, "step", 20)
    assert diagnose(*early, counts=[4, 7], apart=9) is None
    found = diagnose(*early, (4, "step", 20), None, counts=[4, 7, 7, 4], apart=11)
    assert found == HangReport(
        "ranks 0, 3 are frozen, without a heartbeat, last seen in setup of step 0 for 0 s", (0, 3)
    )
    # A rank silent for a moment alone is not named with it.
    found = diagnose((7, "checkpoint", 5), (6, "data", 11), (8, "step", 30), counts=[4, 4, 7])
    assert found == HangReport(
        "rank 1 is frozen, without a heartbeat, last seen in data of step 6 for 11 s", (0, 1)
    )
    found = diagnose((6, "data", 11), (7, "checkpoint", 5), (8, "step", 30), counts=[4, 4, 7])
    assert found == HangReport(
        "rank 0 is frozen, without a heartbeat, last seen in data of step 6 for 11 s", (0, 1)
    )


def test_age_is_counted_from_the_first_reading_of_a_count():
    now = iter((10, 15, 20, 21))
    ages = HeartbeatAges(lambda: next(now))
    one, other = Heartbeat(1, "data", 5, 0.5), Heartbeat(2, "data", 5, 0.5)
    assert ages.update([one, None]) == [0, 0]
    assert ages.update([one, None]) == [5, 5]
    assert ages.update([other, one]) == [0, 0]
    assert ages.update([other, other]) == [1, 0]


def test_a_rank_that_comes_late_but_comes_does_not_hang():
    assert diagnose((7, "data", 1), (7, "step", 11)) is None
    assert diagnose((7, "step", 1), (7, "step", 11)) is None


def test_many_ranks_are_counted():
    found = diagnose(*[(2, "data", 11)] * 20, (3, "data", 11))
    assert found.text.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are in data of step 2")


@pytest.fixture
def stores():
    store = dist.HashStore()
    return [HeartbeatStore(store, rank, 3) for rank in range(3)]


def test_heartbeats_of_ranks_without_any_are_none(stores):
    one, other = Heartbeat(1, "data", 5, 0.5), Heartbeat(9, "step", 5, 1.5)
    assert stores[0].exchange(one) is None
    assert stores[2].exchange(other) is None
    assert stores[1].heartbeats() == [one, None, other]


def test_the_first_hang_report_is_kept(stores):
    first, second = HangReport("rank 1 is in data", (1,)), HangReport("rank 0 is in data")
    assert stores[0].publish(first) == first
    assert stores[2].publish(second) == first
    assert stores[1].exchange(Heartbeat(1, "data", 5, 0.5)) == first
