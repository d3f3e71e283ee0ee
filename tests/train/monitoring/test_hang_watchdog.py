"""Ranks are forked processes with a store in this one, limits are seconds."""

import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from train.monitoring.hang_watchdog import HUNG_EXIT_STATUS, Watchdog
from train.monitoring.sections import Sections
from train.parallel.runtime import start_logging

LIMIT = 1.0


@dataclass
class Job:
    folder: Path
    ranks: list
    store: dist.Store

    def wait(self, *ranks, seconds=15):
        """Return the exit statuses of the ranks, all of them if none is named."""
        deadline = time.monotonic() + seconds
        chosen = [self.ranks[rank] for rank in ranks] or self.ranks
        for process in chosen:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in chosen]

    def log(self, rank):
        return (self.folder / f"{rank}.log").read_text()

    def stacks(self):
        return {path.name: path.read_text() for path in (self.folder / "hangs").glob("*")}

    def records(self):
        path = self.folder / "records"
        return path.read_text().splitlines() if path.exists() else []


def rank_process(work, rank, world_size, folder, port):
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w")  # pytest's goes elsewhere
    os.environ["RANK"] = str(rank)
    start_logging()
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=False,
        timeout=timedelta(seconds=5),
        wait_for_workers=False,
    )

    def record(text, t):
        with (folder / "records").open("a") as file:
            file.write(f"{t} {text}\n")

    sections = Sections()
    with Watchdog(
        sections,
        store,
        folder / "hangs",
        rank=rank,
        world_size=world_size,
        timeout_seconds=LIMIT,
        setup_timeout_seconds=6 * LIMIT,
        record=record,
    ):
        work(rank, sections)
    os._exit(0)  # the parent's atexit functions are not for its children


@pytest.fixture
def start(tmp_path):
    context, jobs = multiprocessing.get_context("fork"), []

    def start(work, ranks=2):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [
            context.Process(target=rank_process, args=(work, rank, ranks, tmp_path, store.port))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        jobs.append(Job(tmp_path, processes, store))
        return jobs[-1]

    yield start
    for job in jobs:
        for process in job.ranks:
            process.kill()
            process.join()


def read_a_dead_disk():
    time.sleep(60)


def test_a_rank_that_hangs_is_named_and_every_rank_writes_its_stacks(start):
    def work(rank, sections):
        sections.enter("data", 7)
        if rank == 1:
            read_a_dead_disk()
        sections.enter("step", 7)
        time.sleep(60)

    begin = time.monotonic()
    job = start(work)
    assert job.wait() == [HUNG_EXIT_STATUS] * 2
    assert time.monotonic() - begin < 8
    found = r"hang: rank 1 is in data of step 7 for \d+ s; the others are in step"
    assert re.search(found, job.log(0))
    assert "rank 1 is" not in job.log(1)
    assert "[rank 1] hang: ended, stacks are in" in job.log(1)
    stacks = job.stacks()
    assert sorted(stacks) == ["rank-00000-step-00000007.txt", "rank-00001-step-00000007.txt"]
    assert "read_a_dead_disk" in stacks["rank-00001-step-00000007.txt"]
    assert "read_a_dead_disk" not in stacks["rank-00000-step-00000007.txt"]
    assert len(job.records()) == 1
    assert job.records()[0].startswith("7 rank 1 is in data")


def test_a_stopped_rank_is_frozen_and_the_next_one_reports_it(start):
    def work(rank, sections):
        sections.enter("step", 3)
        time.sleep(0.5 * LIMIT)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)

    job = start(work, ranks=3)
    assert job.wait(1, 2) == [HUNG_EXIT_STATUS] * 2
    assert "rank 0 is frozen, without a heartbeat, last seen in" in job.log(1)
    assert "hang: ended" in job.log(2)
    assert sorted(job.stacks()) == ["rank-00001-step-00000003.txt", "rank-00002-step-00000003.txt"]


def test_without_its_store_a_rank_still_ends(start):
    def work(rank, sections):
        sections.enter("step", 3)
        time.sleep(60)

    job = start(work, ranks=1)
    time.sleep(0.5)
    job.store = None  # the server ends
    assert job.wait() == [HUNG_EXIT_STATUS]
    found = r"rank 0 is in step of step 3 for \d+ s; the store of heartbeats does not"
    assert re.search(found, job.log(0))
    assert len(job.stacks()) == 1


def test_healthy_ranks_are_left_in_peace(start):
    def work(rank, sections):
        time.sleep(1.5 * LIMIT)  # setup has a longer limit
        for t in range(2):
            for section in ("data", "step", "log", "validate"):
                sections.enter(section, t)
                time.sleep(0.2 * LIMIT)
        sections.enter("checkpoint", 4)
        began = time.monotonic()
        if rank == 0:  # deletes what is old, while rank 1 waits for it in the next step
            time.sleep(2 * LIMIT)
        sections.enter("step", 5)
        time.sleep(began + 2.6 * LIMIT - time.monotonic())

    job = start(work)
    assert job.wait() == [0, 0]
    assert job.log(0) + job.log(1) == ""
    assert job.stacks() == {}


def test_a_job_that_was_put_to_sleep_as_a_whole_goes_on(start):
    def work(rank, sections):
        sections.enter("step", 1)
        for _ in range(9):  # of these, a sleep of the whole process ends one alone
            time.sleep(0.1 * LIMIT)

    job = start(work)
    time.sleep(0.3 * LIMIT)
    for process in job.ranks:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    for process in job.ranks:
        os.kill(process.pid, signal.SIGCONT)
    assert job.wait() == [0, 0]
    assert job.log(0) + job.log(1) == ""


def test_a_full_disk_leaves_the_stacks_on_stderr(start, tmp_path):
    (tmp_path / "hangs").write_text("not a folder")

    def work(rank, sections):
        sections.enter("data", 0)
        read_a_dead_disk()

    job = start(work, ranks=1)
    assert job.wait() == [HUNG_EXIT_STATUS]
    assert re.search(r"rank 0 is in data of step 0 for \d+ s", job.log(0))
    assert "read_a_dead_disk" in job.log(0)
