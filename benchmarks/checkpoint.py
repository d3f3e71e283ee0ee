"""How long training stands still for a checkpoint: written at once, and beside training.

    torchrun --nproc_per_node=2 benchmarks/checkpoint.py --json benchmarks/checkpoint.json

Trains a small Llama on random tokens three times from the same weights, with no checkpoint, with
synchronous and with asynchronous ones, and compares the losses, which must be equal bit for bit.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data.command_line import run_command
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.config import LlamaConfig
from models.flops import total_params
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.checkpointer import CheckpointWriter
from train.checkpoints.content import RunIdentity
from train.optimizer.optim import OptimConfig, build_optimizer
from train.parallel.parallelize import ParallelConfig, build_model
from train.parallel.runtime import Runtime, RuntimeConfig, start_runtime

SEQ_LEN = 64
MODES = ("none", "synchronous", "asynchronous")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure how long training stands still for a checkpoint."""

    dim: int = 512
    """Model width."""
    n_layers: int = 12
    """Layers."""
    steps: int = 24
    """Steps per run."""
    interval: int = 8
    """Steps per save."""
    folder: Path | None = None
    """Where to write; a temporary folder if not given."""
    json: Path | None = None
    """Also write the numbers to this file."""


def compare(options: Options) -> None:
    """Measure, print, and write the numbers down."""
    config = LlamaConfig(
        dim=options.dim,
        n_layers=options.n_layers,
        n_heads=8,
        n_kv_heads=8,
        ffn_dim=4 * options.dim,
        vocab_size=8192,
        max_seq_len=SEQ_LEN,
    )
    with start_runtime(RuntimeConfig(), seed=0) as runtime:
        root = Path(runtime.gather(options.folder or tempfile.mkdtemp())[0])
        runs = {mode: measure(mode, config, options, root, runtime) for mode in MODES}
    if runtime.is_main:
        shutil.rmtree(root / "checkpoints")
        report(config, runs, runtime, options.json)


def measure(
    mode: str, config: LlamaConfig, options: Options, root: Path, runtime: Runtime
) -> dict[str, list[float]]:
    """Train once; return losses, seconds of each step and seconds of each save."""
    model = build_model(config, ParallelConfig(), runtime, seed=0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    (root / "tokenizer.model").write_bytes(b"none")
    identity = RunIdentity(config, {}, root / "tokenizer.model", "none", "none")
    save = CheckpointConfig(asynchronous=mode == "asynchronous", keep_latest=1)
    found: dict[str, list[float]] = {"loss": [], "step": [], "stall": [], "all": []}
    last = config.n_layers - 1
    begin = time.monotonic()
    with CheckpointWriter(
        root / "checkpoints", model, optimizer, config=save, identity=identity, runtime=runtime
    ) as writer:
        for t in range(options.steps):
            start = time.monotonic()
            generator = torch.Generator().manual_seed(t * runtime.world_size + runtime.rank)
            tokens = torch.randint(8192, (1, SEQ_LEN + 1), generator=generator).to(runtime.device)
            hidden = model(tokens[:, :-1], exit_layers=[last]).exits
            loss = early_exit_loss(
                hidden,
                model.head_weight,
                tokens[:, 1:].contiguous(),
                {last: 1.0},
                config=EarlyExitConfig(),
            )
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            found["loss"].append(runtime.sum_over_ranks(loss.total.detach()).item())
            found["step"].append(time.monotonic() - start)
            if mode != "none" and (t + 1) % options.interval == 0:
                start = time.monotonic()
                writer.save(t + 1, {})
                found["stall"].append(time.monotonic() - start)
        writer.wait()
    found["all"].append(time.monotonic() - begin)
    return found


def report(
    config: LlamaConfig,
    runs: dict[str, dict[str, list[float]]],
    runtime: Runtime,
    path: Path | None,
) -> None:
    """Print a table of medians and totals, and write it as JSON."""
    stall = {mode: statistics.median(runs[mode]["stall"]) for mode in MODES[1:]}
    numbers = {
        "parameters": total_params(config),
        "ranks": runtime.world_size,
        "cores": os.cpu_count(),
        "device": runtime.device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "saves": len(runs["synchronous"]["stall"]),
        "median_step_seconds": statistics.median(runs["none"]["step"]),
        "median_stall_seconds": stall,
        "stall_ratio": stall["synchronous"] / stall["asynchronous"],
        "all_stall_seconds": {mode: runs[mode]["stall"] for mode in MODES[1:]},
        "run_seconds": {mode: runs[mode]["all"][0] for mode in MODES},
        "losses_equal": all(runs[mode]["loss"] == runs["none"]["loss"] for mode in MODES),
    }
    print(json.dumps(numbers, indent=1))
    if path is not None:
        path.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    run_command(Options, compare, prog="benchmarks/checkpoint.py")
