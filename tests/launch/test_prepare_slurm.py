"""launch/prepare.slurm on a real SLURM of two nodes: three jobs, of which a task is killed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.preparation import PrepareConfig, prepare
from tests.data.test_preparation import files
from tests.launch.conftest import ROOT
from tests.launch.test_slurm import process_of


def submit(slurm, *arguments, **environment):
    """Submit the three jobs and return their numbers by stage."""
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    text = slurm.call("bash", "launch/prepare.slurm", *arguments, PATH=path, **environment)
    return dict(re.findall(r"^(\w+): job (\d+)$", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_array_over_two_nodes_gives_the_bytes_of_one_process_though_a_task_is_killed(
    slurm, tmp_path, tokenizer_path
):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(9):
        words = " ".join(str(n * i) for i in range(200_000))
        (source / f"{n}.txt").write_text(words)
    config = PrepareConfig(input=(str(source),), tokenizer=tokenizer_path)
    arguments = (
        "--input",
        str(source),
        "--output",
        str(output),
        "--tokenizer",
        str(tokenizer_path),
    )
    options = f"--cpus-per-task=2 --output={tmp_path}/%x-%A_%a.log"
    jobs = submit(slurm, *arguments, TASKS="3", SBATCH=options)
    killed = f"{jobs['encode']}_1"
    pieces = tmp_path / ".out.partial-tasks" / "pieces"

    def encoding():
        job = re.search(r"JobId=(\d+)", slurm.call("scontrol", "show", "job", killed))[1]
        return process_of(job, "data.prepare", "SLURM_ARRAY_TASK_ID=1") if pieces.is_dir() else None

    slurm.wait_until(encoding, 120)
    os.kill(encoding(), signal.SIGKILL)
    slurm.wait_until(lambda: slurm.state(killed)[1] == 1, 60)
    slurm.hurry(killed)
    assert slurm.wait(jobs["merge"], 200)[0] == "COMPLETED"
    logs = {path.name.partition("-")[2]: path.read_text() for path in tmp_path.glob("*.log")}
    nodes = set(re.findall(r"encode, on (n\d), restart 0", "".join(logs.values())))
    assert nodes == {"n1", "n2"}
    log = next(text for text in logs.values() if "ended by signal 9, requeued" in text)
    assert f"== job {killed}: encode, on n" in log
    assert log.endswith(f"== job {killed}: encode done\n")
    whole = prepare(config, tmp_path / "whole", workers=1)
    assert files(output) == files(whole.path)
    again = submit(slurm, *arguments, TASKS="3", SBATCH=options)
    assert slurm.wait(again["merge"], 100)[0] == "COMPLETED"


@pytest.mark.parametrize("tasks", ["0", "x"])
def test_a_number_of_tasks_that_is_none_is_one_line(tasks):
    done = subprocess.run(
        ["bash", "launch/prepare.slurm"],
        cwd=ROOT, env=os.environ | {"TASKS": tasks}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: TASKS: {tasks}, give the number of tasks\n"
