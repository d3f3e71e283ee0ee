"""Other jobs are forked processes; other hosts are lock files that name one."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch

from train.parallel.runtime import Runtime
from train.run_folder import run_lock
from train.run_folder.run_lock import acquire, lock_run

FORK = multiprocessing.get_context("fork")


def dead_pid():
    process = FORK.Process(target=lambda: None)
    process.start()
    process.join()
    return process.pid


def leave_lock(folder, *, number=1, age=0.0, **fields):
    """Write the lock of a job on another host, `age` seconds after its last heartbeat."""
    holder = {
        "host": "node17",
        "pid": 4321,
        "started": "777",
        "namespace": "pid:[1]",
        "job": "",
        "time": 0.0,
        "token": "theirs",
    }
    path = folder / f"run.lock.{number}"
    path.write_text(json.dumps(holder | fields))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def held_by(folder):
    """Return the fields of the one lock there is."""
    (path,) = folder.glob("run.lock.*")
    return json.loads(path.read_text())


def hold(folder, ready):
    acquire(folder, "")
    ready.set()
    time.sleep(60)


@pytest.fixture
def other_job(tmp_path):
    """Start a process that holds the run."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(10)
    yield process
    process.kill()
    process.join()


def test_the_lock_is_gone_after_its_release(tmp_path):
    for _ in range(2):
        lock = acquire(tmp_path, "")
        assert held_by(tmp_path)["pid"] == os.getpid()
        lock.release()
        assert list(tmp_path.iterdir()) == []


def test_a_second_job_is_refused_with_the_name_of_the_holder(tmp_path, other_job):
    host = os.uname().nodename
    with pytest.raises(
        ValueError, match=rf"process {other_job.pid} on host {host}, last heartbeat"
    ):
        acquire(tmp_path, "")
    with pytest.raises(ValueError, match="stop that job or choose another --name"):
        acquire(tmp_path, "")
    assert held_by(tmp_path)["pid"] == other_job.pid


def test_a_killed_holder_is_recovered(tmp_path, other_job, caplog):
    os.kill(other_job.pid, signal.SIGKILL)
    time.sleep(0.1)  # not joined: it is a zombie, which kill(pid, 0) still finds
    lock = acquire(tmp_path, "")
    assert f"process {other_job.pid} on host" in caplog.text
    assert held_by(tmp_path)["pid"] == os.getpid()
    lock.check()


def test_a_process_that_has_only_the_number_of_the_holder_is_another(tmp_path):
    lock = acquire(tmp_path, "")
    fields = held_by(tmp_path) | {"started": "1"}
    lock.release()
    leave_lock(tmp_path, **fields)
    acquire(tmp_path, "").check()


def test_a_job_on_another_host_lives_as_long_as_it_gives_signs(tmp_path, caplog):
    leave_lock(tmp_path, age=50)
    with pytest.raises(ValueError, match="process 4321 on host node17, last heartbeat 5.* s ago"):
        acquire(tmp_path, "")
    leave_lock(tmp_path, age=70)
    lock = acquire(tmp_path, "")
    assert "process 4321 on host node17: no heartbeat for 7" in caplog.text
    assert held_by(tmp_path)["pid"] == os.getpid()
    lock.release()


def test_a_container_on_this_host_has_process_numbers_of_its_own(tmp_path):
    leave_lock(tmp_path, host=os.uname().nodename, pid=dead_pid(), age=5)
    with pytest.raises(ValueError, match="is being written"):
        acquire(tmp_path, "")


def test_the_same_job_restarted_takes_its_lock_back(tmp_path):
    leave_lock(tmp_path, job="slurm-17")
    for job in ("", "slurm-18"):
        with pytest.raises(ValueError, match="is being written"):
            acquire(tmp_path, job)
    acquire(tmp_path, "slurm-17").check()


def test_no_name_of_a_job_is_not_the_same_job(tmp_path):
    leave_lock(tmp_path, job="")
    with pytest.raises(ValueError, match="is being written"):
        acquire(tmp_path, "")


def test_a_half_written_lock_counts_by_its_age(tmp_path):
    path = tmp_path / "run.lock.1"
    path.write_text('{"host": "no')
    with pytest.raises(ValueError, match="a job that has just started"):
        acquire(tmp_path, "")
    os.utime(path, (time.time() - 70, time.time() - 70))
    acquire(tmp_path, "").check()


def test_a_sign_of_life_renews_the_lock(tmp_path):
    lock = acquire(tmp_path, "")
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))
    lock.refresh()
    assert time.time() - path.stat().st_mtime < 5


@pytest.mark.parametrize("ours_is_deleted", [False, True])
def test_a_holder_taken_for_dead_notices_and_keeps_its_hands_off(
    tmp_path, monkeypatch, ours_is_deleted
):
    monkeypatch.setattr(run_lock, "DECIDED_WITHIN_SECONDS", 60.0 if ours_is_deleted else 0.1)
    lock = acquire(tmp_path, "")
    if ours_is_deleted:
        (tmp_path / "run.lock.1").unlink()
    theirs = leave_lock(tmp_path, number=2)  # after an outage, another host recovered the run
    assert lock.lost == ""
    with pytest.raises(ValueError, match="taken over by process 4321 on host node17"):
        lock.check()
    assert "taken over by" in lock.lost
    lock.release()
    assert theirs.exists()


def test_a_holder_waits_for_a_job_that_withdraws(tmp_path):
    lock = acquire(tmp_path, "")
    withdrawn = leave_lock(tmp_path, number=7)  # it has read locks that were there before ours
    later = threading.Timer(0.2, withdrawn.unlink)
    later.start()
    lock.check()
    assert not withdrawn.exists()
    later.join()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_lock_is_a_lost_one(tmp_path):
    lock = acquire(tmp_path, "")
    (tmp_path / "run.lock.1").unlink()
    with pytest.raises(ValueError, match="taken over by another job"):
        lock.check()


def race(folders, barrier, results):
    for folder in folders:
        barrier.wait(10)
        try:
            acquire(folder, "")
            results.put((folder.name, os.getpid()))
        except ValueError:
            pass
    barrier.wait(10)  # the winners live until all have tried


@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_of_jobs_that_start_at_once_one_wins(tmp_path, stale):
    dead, results, barrier = dead_pid(), FORK.SimpleQueue(), FORK.Barrier(3)
    folders = [tmp_path / str(attempt) for attempt in range(200)]
    for folder in folders:
        folder.mkdir()
        if stale:
            leave_lock(folder, host=os.uname().nodename, namespace=run_lock._namespace(), pid=dead)
    jobs = [FORK.Process(target=race, args=(folders, barrier, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    winners = [results.get() for _ in folders]
    for job in jobs:
        job.join(20)
    assert results.empty()
    assert dict(winners) == {folder.name: held_by(folder)["pid"] for folder in folders}


@pytest.mark.parametrize("number", [1, 3])
def test_a_job_that_judged_by_what_is_no_longer_there_gives_way(tmp_path, monkeypatch, number):
    stale, create = leave_lock(tmp_path, age=70), run_lock._create

    def create_late(path, holder):
        """Let others come and go between a job's reading and its lock; the last one lives."""
        stale.unlink(missing_ok=True)
        leave_lock(tmp_path, number=number, token="newer")
        return create(path, holder)

    monkeypatch.setattr(run_lock, "_create", create_late)
    with pytest.raises(ValueError, match="is being written"):
        acquire(tmp_path, "")
    assert held_by(tmp_path)["token"] == "newer"


def start_and_die(folder, seed):
    """Take the lock 25 times; sometimes leave it as a job that was killed does."""
    random.seed(seed)
    dead, count = dead_pid(), 0
    while count < 25:
        try:
            lock = acquire(folder, "")
        except ValueError:
            continue
        inside = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # fails where two are in
        os.close(inside)
        count += 1
        time.sleep(random.uniform(0, 0.002))
        (folder / "inside").unlink()
        if random.random() < 0.5:
            aside = folder / f"aside-{seed}"
            aside.write_text(json.dumps(vars(run_lock._this_process("")) | {"pid": dead}))
            aside.rename(lock._path)
        else:
            lock.release()


def test_a_run_is_never_held_twice_however_often_jobs_come_and_die(tmp_path):
    jobs = [FORK.Process(target=start_and_die, args=(tmp_path, n)) for n in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    statuses = [job.exitcode for job in jobs]
    for job in jobs:
        job.kill()  # one that still runs would keep the tests from ending
    assert statuses == [0] * 4


class Alone(Runtime):
    def gather(self, value):
        return [value]


def test_lock_run_gives_signs_of_life_and_releases(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "REFRESH_SECONDS", 0.05)
    runtime = Alone(0, 1, torch.device("cpu"), "")
    with lock_run(tmp_path, runtime) as lock:
        (path,) = tmp_path.iterdir()
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 5
        path.unlink()
        time.sleep(0.5)
        assert lock.lost
    with pytest.raises(ValueError, match="cannot be locked"), lock_run(tmp_path / "no", runtime):
        pass
