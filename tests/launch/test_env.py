"""launch/env.sh gives the ranks of a node its GPUs or cores, and each its share of the threads."""

import os
import subprocess

import pytest

from tests.training import ROOT


@pytest.mark.parametrize(
    ("given", "ranks", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "12", "RANKS": "1"}, 1, 12),
        ({"SLURM_CPUS_PER_TASK": "12", "RANKS": "4"}, 4, 3),
        ({"SLURM_CPUS_ON_NODE": "6", "RANKS": "2"}, 2, 3),
        ({"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}, 1, 1),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": "7"}, 2, 1),
        ({"SLURM_CPUS_PER_TASK": "2", "RANKS": "8"}, 8, 1),
        ({"OMP_NUM_THREADS": "5", "SLURM_CPUS_PER_TASK": "12", "RANKS": "1"}, 1, 5),
    ],
)
def test_ranks_share_the_cores_of_the_job_and_not_of_the_machine(given, ranks, threads):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") and name not in ("RANKS", "OMP_NUM_THREADS")
    }
    printed = subprocess.run(
        ["bash", "-euc", "nvidia-smi() { false; }; . launch/env.sh; echo $RANKS $OMP_NUM_THREADS"],
        cwd=ROOT, env=environment | given, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed.split() == [str(ranks), str(threads)]


@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_memory_of_gpus_grows_unless_the_user_sets_it(given):
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}
    environment |= {} if given is None else {"PYTORCH_ALLOC_CONF": given}
    printed = subprocess.run(
        ["bash", "-euc", ". launch/env.sh; echo $PYTORCH_ALLOC_CONF"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed.strip() == (given or "expandable_segments:True")
