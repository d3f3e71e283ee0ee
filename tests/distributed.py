"""Run a test function on several gloo ranks, each a process of its own."""

import multiprocessing
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, distribute_tensor

from train.parallel.runtime import RuntimeConfig, start_runtime

ROOT = Path(__file__).parent.parent
SLOW_TO_IMPORT = ("train.parallel.parallelize", "train.checkpoints.resume", "torch._dynamo")


def whole(tensor):
    """Return all of a tensor that may be sharded; every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter, value):
    """Return a tensor, the same on every rank, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def run_distributed(function, world_size, *arguments):
    """Call function(runtime, *arguments) on every rank; a failing rank fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ranks are forked from one process that has imported what takes the seconds. Where that has
    # seen a GPU, as torchtitan's import does, its forks may not use one.
    multiprocessing.set_forkserver_preload(["tests.distributed", *SLOW_TO_IMPORT])
    mp.start_processes(
        _rank,
        args=(function, world_size, port, arguments),
        nprocs=world_size,
        start_method="spawn" if torch.cuda.is_available() else "forkserver",
    )


def _rank(rank, function, world_size, port, arguments):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with start_runtime(RuntimeConfig(timeout_seconds=120), seed=0) as runtime:
        function(runtime, *arguments)
