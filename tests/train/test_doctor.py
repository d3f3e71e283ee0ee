"""`python -m train.doctor`: what is wrong is found, named with a remedy, and never waited for."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.training import ROOT
from train import doctor
from train.diagnosis import devices, machine, packages, programs
from train.diagnosis.findings import Check, Finding, Level
from train.diagnosis.machine import check_disk

# Rank 1 of a case does what the case is called; torch is imported once, for all of them.
CASES = """
import json, os, socket, sys, time
import torch, train.parallel.runtime
from train.diagnosis import ranks

def hang(*_):
    time.sleep(60)

def fail(*_):
    raise RuntimeError("no route\\nto host")

def die(*_):
    os.kill(os.getpid(), 9)

def older(name):
    return "0.1"

def start(case):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    added, version = ranks._added, ranks.importlib.metadata.version
    if case in ("hang", "fail", "die"):
        ranks._added = globals()[case]
    if case == "older":
        ranks.importlib.metadata.version = older
    note = ranks.Finding("gpu", ranks.Level.PROBLEM, "7: none", "buy one")
    second = [ranks.start_rank(1, 2, 60, [note], port)] if case != "absent" else []
    ranks._added, ranks.importlib.metadata.version = added, version
    return [ranks.start_rank(0, 2, 10, port=port), *second]

cases = {case: start(case) for case in sys.argv[1:]}
print(json.dumps({case: [str(f) for f in found[0].findings()] for case, found in cases.items()}))
for found in cases.values():
    for check in found:
        check.stop()
os._exit(0)
"""


def run_doctor(*words, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "train.doctor", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_a_machine_that_can_train(tmp_path):
    keys = {"WANDB_API_KEY": "key-of-mine", "AWS_SECRET_ACCESS_KEY": "key-of-mine"}
    report = tmp_path / "doctor.json"
    folder = tmp_path / "runs"
    folder.mkdir()
    done = run_doctor(
        "--output_dir", str(folder), "--json", str(report), HOME=str(tmp_path), **keys
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "2 by gloo, all-reduce of 16 MiB" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("training is possible (")
    assert not [*folder.iterdir()]
    text = report.read_text()
    content = json.loads(text)
    assert content["possible"]
    assert {finding["check"] for finding in content["findings"]} >= {
        *("python", "packages", "imports", "torch", "gpu", "memory", "disk", "slurm", "ranks")
    }
    for secret in ("key-of-mine", str(tmp_path), socket.gethostname()):
        assert secret not in text
    versions = next(f for f in content["findings"] if f["check"] == "packages")["details"]
    assert versions["torch"]["range"] == ">=2.11"
    for line in done.stdout.splitlines()[:-2]:
        assert line.startswith("ok ") or " -> " in line, line


def test_a_report_names_neither_host_nor_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    found = "/home/al/runs, /scratch/al/runs, /alt/al, node7: node77 also has /also"
    (finding,) = json.loads(doctor.report([Finding("a", Level.OK, found)], True))["findings"]
    assert finding["found"] == "~/runs, /scratch/USER/runs, /alt/USER, HOST: node77 also has /also"


def test_a_rank_that_does_not_come_or_go_on_is_named():
    done = subprocess.run(
        [sys.executable, "-c", CASES, "absent", "hang", "fail", "die", "older"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {case: lines[0] for case, lines in json.loads(done.stdout).items()}
    assert "rank 1 did not come within 10 s -> see the output of that rank" in found["absent"]
    assert "ranks 0, 1 did not end the all-reduce within 10 s -> " in found["hang"]
    assert "rank 1 failed: no route to host -> " in found["fail"]
    assert "nothing of rank 1 since -> name the network" in found["die"]
    assert all(found[case].startswith("problem ") for case in ("absent", "hang", "fail", "die"))
    lines = json.loads(done.stdout)["older"]
    assert lines[0].startswith("ok ")
    assert "on the machine of rank 1: 7: none -> buy one" in lines[1]
    assert "torch is 0.1 on rank 1, " in lines[2]


def test_a_check_that_hangs_or_dies_takes_nothing_with_it():
    def hang():
        yield Finding("a", Level.OK, "first")
        time.sleep(60)

    def die():
        os.kill(os.getpid(), signal.SIGSEGV)
        yield

    def fail():
        yield Finding("a", Level.OK, "first")
        raise KeyError("x")

    def lack():
        import no_such_package  # noqa: F401

        yield

    first = Finding("a", Level.OK, "first")
    for function, *expected in (
        (hang, first, Finding("a", Level.PROBLEM, "no answer within 1 s", "mend it")),
        (die, Finding("a", Level.PROBLEM, "its process died of SIGSEGV", "mend it")),
        (fail, first, Finding("a", Level.WARNING, "the check failed, KeyError: 'x'")),
        (
            lack,
            Finding(
                "a",
                Level.PROBLEM,
                "no_such_package is not installed",
                "pip install no_such_package",
            ),
        ),
    ):
        assert [*Check("a", function, seconds=1, remedy="mend it").findings()] == expected


def test_versions_and_imports_are_held_against_what_is_required(monkeypatch):
    wanted = {
        "": [Requirement(text) for text in ("torch>=99", "no-such-package>=1", "tqdm")],
        "html": [Requirement("no-such-parser>=1")],
        "s3": [Requirement("fsspec<1")],
        "dedup": [Requirement("wandb")],
        "serve": [Requirement("packaging>=20")],
    }
    monkeypatch.setattr(packages, "requirements", lambda: wanted)
    monkeypatch.setattr(packages, "tested_versions", lambda: {"tqdm": "0.1"})
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    lines = [str(finding) for finding in packages.check_packages()]
    for level, check, text in (
        (
            "problem",
            "packages",
            "must be >=99 -> pip install -c launch/constraints.txt 'torch>=99'",
        ),
        ("problem", "packages", "no-such-package is not installed -> pip install "),
        ("ok", "packages", "1 of 3 in range; newer than tested: tqdm "),
        ("problem", "imports", "tqdm cannot be imported, ModuleNotFoundError: "),
        ("optional", "features", "html: no-such-parser not installed, needed for HTML as input"),
        ("warning", "features", "must be <1, needed for s3:// URLs -> pip install "),
        ("warning", "features", "dedup: wandb cannot be imported, "),
        ("ok", "features", "serve"),
    ):
        assert [x for x in lines if x.split()[:2] == [level, check] and text in x], (text, lines)


def test_newer_than_tested_warns_for_torch_alone(monkeypatch):
    monkeypatch.setattr(packages, "tested_versions", lambda: {"torch": "1.0", "numpy": "1.0"})
    levels = [finding.level for finding in packages.check_versions()]
    assert levels == [Level.WARNING, Level.OK]


def test_requirements_are_those_of_the_installed_package_without_a_clone(monkeypatch):
    in_clone = packages.requirements()
    assert {"dedup", "s3", "test"} < {*in_clone}
    try:
        packages.importlib.metadata.version(packages.NAME)
    except packages.importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package installed")
    monkeypatch.setattr(packages, "in_clone", lambda: False)
    assert {each.name for each in packages.requirements()["dedup"]} == {"rensa"}
    assert {"torch", "torchtitan"} <= {each.name for each in packages.requirements()[""]}
    assert packages.pip([Requirement("a>=1")]) == "pip install 'a>=1'"


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "delete old runs"), (errno.EROFS, "choose an --output_dir that you may write")],
)
def test_a_full_or_read_only_disk_is_a_finding(number, remedy, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "fsync", refuse(number))
    (finding,) = check_disk(tmp_path / "not" / "yet")
    assert finding.level is Level.PROBLEM
    assert os.strerror(number) in finding.found
    assert finding.remedy.startswith(remedy)
    assert not [*tmp_path.iterdir()]


def test_a_disk_that_returns_other_bytes_is_a_problem(tmp_path, monkeypatch):
    def spoil(number, *_):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        with path.open("r+b") as file:
            file.seek(machine.BLOCK + 5)
            file.write(b"spoiled")

    monkeypatch.setattr(machine.os, "posix_fadvise", spoil)
    (finding,) = check_disk(tmp_path)
    assert (finding.level, "other bytes are read" in finding.found) == (Level.PROBLEM, True)


def test_disks_are_judged_by_space_and_speed():
    def level(free, speed):
        return machine._disk_found(Path("outputs"), free, speed, 1e9).level

    assert level(1 << 40, 1e9) is Level.OK
    assert level(1 << 30, 1e9) is level(1 << 40, 1e6) is Level.WARNING
    (finding,) = check_disk(Path(__file__) / "runs")
    assert (finding.level, "is no folder" in finding.found) == (Level.PROBLEM, True)


def test_memory_of_a_cgroup_counts_where_it_is_less(tmp_path, monkeypatch):
    free, total = machine.free_memory()
    assert 0 < free <= total
    group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)
    folder = tmp_path / group[1] / group[2].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if not group[1] else machine._FIRST_VERSION
    for name, text in zip((*names, "memory.stat"), ("3000", "1000", "inactive_file 500"), strict=1):
        (folder / name).write_text(text)
    monkeypatch.setattr(machine, "_CONTROL", tmp_path)
    assert machine.free_memory() == (2500, 3000)


@pytest.mark.parametrize(
    ("tasks", "rank", "level"), [("8", "", "warning"), ("8(x2)", "0", "ok"), ("1(x4)", "", "ok")]
)
def test_tasks_of_a_job_that_are_no_ranks_are_found(tasks, rank, level, monkeypatch):
    job = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
    job |= {"SLURM_TASKS_PER_NODE": tasks, **({"RANK": rank, "WORLD_SIZE": "16"} if rank else {})}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/nowhere")
    (finding,) = programs.check_slurm()
    assert (finding.level, finding.found[:19]) == (level, "in a job of 2 nodes")


def test_a_compiler_is_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    (finding,) = programs.check_compiler()
    assert (finding.level, "there is no" in finding.found) == (Level.OPTIONAL, True)
    (tmp_path / "none").write_text(
        "#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2; exit 1"
    )
    (tmp_path / "none").chmod(0o755)
    (finding,) = programs.check_compiler()
    assert finding.remedy == "install the headers (python3-dev)"


def test_gpus_that_torch_does_not_see_are_a_problem(monkeypatch):
    monkeypatch.setattr(devices, "listed_gpus", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices._none(None).remedy == "pip install --force-reinstall torch, a build with CUDA"
    assert devices._none("12.8").level is Level.PROBLEM
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices._none("12.8").level is Level.OK


def test_options_are_read_where_tyro_is_there(monkeypatch):
    assert doctor.read_words(["--limit_seconds", "5"]).limit_seconds == 5
    with pytest.raises(ValueError, match="limit_seconds: 0, must be 1 to 3600"):
        doctor.read_words(["--limit_seconds", "0"])
    monkeypatch.setitem(sys.modules, "data.command_line", None)
    assert doctor.read_words(["--limit_seconds", "5"]) == doctor.DoctorOptions()


@pytest.mark.slow
def test_under_torchrun_rank_0_prints_for_all(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    for words, status in ([], 0), (["--output_dir", "/proc/none"], 2):
        done = subprocess.run(
            [*command, str(ROOT / "train" / "doctor.py"), *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert bool(done.returncode) == bool(status), done.stderr
        if entry_points(group="torchrun.handlers").names & {"skipstone"}:
            assert "Traceback" not in done.stderr
        assert done.stdout.count("2 by gloo") == done.stdout.count("possible") == 1
