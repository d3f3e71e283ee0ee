import json
import multiprocessing
import os
import resource
import signal
import time

import pytest

from train.run_folder.events import EventLog, first_start, goodput, starts, write_status


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def test_events_come_back_in_order_over_restarts(path):
    log = EventLog(path, writes=True)
    log.append("start", 0)
    log.append("update_skipped", 7, rank=1, exit=3)
    again = EventLog(path, writes=True)
    again.append("start", 5)
    events = again.read()
    assert [(event["kind"], event["step"]) for event in events] == [
        ("start", 0),
        ("update_skipped", 7),
        ("start", 5),
    ]
    assert (events[1]["rank"], events[1]["exit"]) == (1, 3)
    assert abs(events[0]["time"] - time.time()) < 60
    assert log.read() == events


def test_one_rank_writes_and_all_may_read(path):
    EventLog(path, writes=False).append("start", 0)
    assert not path.exists()
    assert EventLog(path, writes=False).read() == []
    EventLog(path, writes=True).append("start", 0)
    assert len(EventLog(path, writes=False).read()) == 1


@pytest.mark.parametrize(
    "torn", [b'{"time": 1.0, "ki', b'{"time": 1.0, "kind": "spike", "step": 3}']
)
def test_a_torn_last_line_is_cut_off(path, caplog, torn):
    log = EventLog(path, writes=True)
    log.append("start", 0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    log = EventLog(path, writes=True)
    assert "torn last line" in caplog.text
    assert path.read_bytes() == whole
    log.append("finish", 8)
    assert [event["kind"] for event in log.read()] == ["start", "finish"]


def test_a_log_that_is_only_a_torn_line_is_emptied(path):
    path.write_bytes(b'{"time"')
    EventLog(path, writes=True)
    assert path.read_bytes() == b""


def test_damaged_lines_are_left_out(path, caplog):
    log = EventLog(path, writes=True)
    log.append("start", 0)
    with path.open("ab") as file:
        file.write(b'\x00\xff\x00\n[1]\n{"time": 1.0, "kind": "spike"}\n')
        file.write(b'{"time": "x", "kind": "start", "step": 0}\n')
        file.write(
            b'{"time": 1.0, "kind": [], "step": 0}\n{"time": 1.0, "kind": "a", "step": null}\n'
        )
    log.append("finish", 8)
    assert [event["kind"] for event in log.read()] == ["start", "finish"]
    assert caplog.text.count("damaged line") == 6


def test_a_pipe_that_nobody_reads_is_an_error_and_no_wait(path, caplog):
    os.mkfifo(path)
    log = EventLog(path, writes=True)
    log.append("start", 0)
    assert log.read() == []
    assert "events.jsonl: not written, No such device or address" in caplog.text


def fill_disk(path, status):
    """Write with a limit on the size of files in place of a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = EventLog(path, writes=True)
    log.append("start", 0)
    write_status([status], "running", 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    log.append("spike", 3, text="x" * 80)
    with pytest.raises(OSError, match="No space left"):
        log.append_required("rollback", 3, text="x" * 80)
    write_status([status], "failed", 3, "x" * 80)


def test_a_full_disk_costs_the_line_not_the_run(path, tmp_path):
    status = tmp_path / "status.json"
    process = multiprocessing.get_context("fork").Process(target=fill_disk, args=(path, status))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert path.read_bytes().endswith(b"\n")
    assert [event["kind"] for event in EventLog(path, writes=True).read()] == ["start"]
    assert json.loads(status.read_text())["state"] == "running"


def event(kind, when):
    return {"time": when, "kind": kind, "step": 0}


def test_goodput_is_the_share_of_time_since_the_first_start():
    events = [event("alarm", 50.0), event("start", 100.0), event("start", 160.0)]
    assert starts(events) == 2
    assert first_start(events) == 100.0
    assert goodput(75.0, events, 200.0) == 0.75
    assert goodput(75.0, events, 100.0) == 0.0  # a clock set back
    assert goodput(75.0, events, 150.0) == 1.0
    assert (starts([]), first_start([]), goodput(75.0, [], 200.0)) == (0, None, 0.0)


def test_the_status_is_written_to_every_path(tmp_path, caplog):
    paths = [tmp_path / "status.json", tmp_path / "slurm" / "17.json"]
    write_status(paths, "running", 3)
    write_status([tmp_path / "status.json" / "x", *paths], "preempted", 5, "SIGTERM", saved=4)
    (tmp_path / "folder").mkdir()
    write_status([tmp_path / "folder"], "running", 3)
    assert list(tmp_path.glob("*.tmp")) == []
    for path in paths:
        status = json.loads(path.read_text())
        assert abs(status.pop("time") - time.time()) < 60
        assert status == {"state": "preempted", "step": 5, "saved": 4, "reason": "SIGTERM"}
        assert list(path.parent.glob("*.tmp")) == []
    assert "status.json/x: not written, File exists; training goes on" in caplog.text
