"""The steps named are profiled, on the ranks named, wherever a run begins or ends."""

import gzip
import json

import pytest
import torch

from train.monitoring.sections import Sections
from train.parallel.runtime import Runtime
from train.run_folder.profiler import ProfileConfig, Profiler


def profiled(folder, first, stop, *, rank=0, device="cpu", **fields):
    """Take the steps first, ..., stop - 1 and return {file: the steps in its trace}."""
    runtime = Runtime(rank=rank, world_size=2, device=torch.device(device), job="")
    profiler = Profiler(ProfileConfig(**fields), stop, folder, runtime, Sections())
    for t in range(first, stop):
        profiler.enter(t)
        torch.ones(2) + 1
    profiler.enter(stop)
    profiler.close()
    return {path.name: steps_of(path) for path in sorted((folder / "profile").glob("*.json.gz"))}


def steps_of(path):
    with gzip.open(path) as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("dur")]
    assert "aten::add" in names
    return sorted(name for name in names if name.startswith("ProfilerStep#"))


@pytest.mark.parametrize(
    ("first", "stop", "found"),
    [
        (0, 9, ["ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"]),
        (5, 9, ["ProfilerStep#5", "ProfilerStep#6"]),  # resumed within
        (7, 9, None),  # resumed behind
        (0, 6, ["ProfilerStep#4", "ProfilerStep#5"]),  # ended within
    ],
)
def test_the_steps_named_are_profiled_wherever_the_run_begins(tmp_path, first, stop, found):
    traces = profiled(tmp_path, first, stop, start=4, steps=3)
    assert [*traces.values()] == ([found] if found else [])


def test_one_rank_or_all_are_profiled_and_none_by_default(tmp_path):
    assert profiled(tmp_path, 0, 3) == {}
    assert profiled(tmp_path, 0, 3, rank=1, steps=1) == {}
    [name] = profiled(tmp_path, 0, 3, rank=1, steps=1, ranks="all")
    assert name == "steps-00000000-00000000-rank-1.pt.trace.json.gz"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_a_snapshot_of_memory_lies_beside_the_trace(tmp_path, monkeypatch):
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda *_, **how: calls.append(how))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: open(path, "wb").close())
    profiled(tmp_path, 0, 4, start=1, steps=2, device="cuda")
    assert [how.get("enabled", "all") for how in calls] == ["all", None]
    assert (tmp_path / "profile" / "steps-00000001-00000002-rank-0.memory.pickle").exists()


def test_a_trace_that_cannot_be_written_costs_the_trace_alone(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    profiled(tmp_path, 0, 3, steps=1)
    assert "not written" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 8, "steps": 1}, "profile.start: 8, but the run's last step is 7"),
        ({"start": 3}, "profile.start: 3, but profile.steps is 0, give the number of steps"),
        ({"steps": -1}, "profile.steps: -1, must not be negative"),
    ],
)
def test_what_would_profile_nothing_is_named(fields, message):
    [line] = ProfileConfig(**fields).problems(8)
    assert line.startswith(message)
    assert ProfileConfig(start=7, steps=5).problems(8) == []
