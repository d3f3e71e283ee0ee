"""Processes that share work: each item once, the earliest failure, no process left behind."""

import multiprocessing
import os
import signal
import time
from itertools import repeat

import pytest

from data.pieces.workers import start_workers


def doubled(number: int) -> int:
    if number in (13, 17):
        time.sleep(0.5 * (number == 13))  # so that the other one comes first, where it can
        raise ValueError(f"no {number}")
    return 2 * number


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_item_is_worked_on_once_and_the_earliest_failure_raised(count: int) -> None:
    with start_workers(count) as workers:
        assert sorted(workers.run(doubled, range(10))) == [*range(0, 20, 2)]
        assert not list(workers.run(doubled, []))
        with pytest.raises(ValueError, match="no 13"):
            list(workers.run(doubled, range(20)))
    assert not multiprocessing.active_children()


def test_signals_to_all_are_left_to_the_parent_and_a_loss_is_one_line() -> None:
    with start_workers(2) as workers:
        results = workers.run(doubled, repeat(1))
        next(results)
        # A terminal or SLURM signals them all; what becomes of the work is the parent's to decide.
        children = multiprocessing.active_children()
        for worker in children:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid, number)
        assert [next(results) for _ in range(4)] == [2] * 4
        children[0].kill()
        with pytest.raises(ValueError, match="workers 2: one of them was killed"):
            list(results)
    assert not multiprocessing.active_children()
