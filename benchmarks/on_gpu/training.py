"""Training: host syncs, checkpoints, MFU and a profile of a step.

Imports of `train` are inside the blocks, so that the others run where its wheels are missing.
"""

import statistics
import warnings
from collections import Counter
from typing import Any

import torch

from benchmarks.on_gpu.plan import planned_gib
from benchmarks.on_gpu.session import Session
from data.loader import Microbatch
from models.flops import train_flops_per_token
from models.sizes import SIZES
from train.parallel.local_part import local_part

ROWS = {"110m": 32, "350m": 16, "layerskip_1.5b": 4}
"""Sequences of a microbatch, as in the presets."""
WARM, TIMED = 3, 5


class Trainer:
    """A model, its optimizer and random batches, stepped as `train/main.py` steps them."""

    def __init__(self, session: Session, size: str, mode: str, *, compiles: bool = False) -> None:
        from train.optimizer.optim import build_optimizer
        from train.parallel.parallelize import ParallelConfig, build_model

        self.session, self.config, self.t = session, train_config(session, size, mode), 0
        parallel = ParallelConfig(compile=compiles)
        runtime = session.runtime
        self.model = build_model(self.config.model, parallel, runtime, 0)
        self.optimizer = build_optimizer(self.model, self.config.optim)

    def batch(self) -> list[Microbatch]:
        """Return random microbatches of one step, in page-locked memory on a GPU."""
        data, draw = self.config.data, torch.Generator().manual_seed(self.t)
        found = []
        for m in range(2):
            shape = (data.microbatch_size, data.seq_len + 1)
            tokens = torch.randint(self.config.model.vocab_size, shape, generator=draw)
            samples = torch.arange(shape[0]) + m * shape[0]
            one = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), samples)
            found.append(one.pin_memory() if self.session.on_gpu else one)
        return found

    def step(self) -> Any:
        """Take one step."""
        from train.loop.step import train_step

        plan = self.config.layerskip.at(self.t)
        self.t += 1
        return train_step(
            self.model, self.optimizer, self.batch(), plan, self.t - 1,
            config=self.config.step_config, runtime=self.session.runtime,
        )  # fmt: skip

    def flops(self, steps: range) -> float:
        """Return the FLOPs of one of these steps, on average."""
        plans, data = [self.config.layerskip.at(t) for t in steps], self.config.data
        per_token = train_flops_per_token(
            self.config.model,
            data.seq_len,
            mean_layers=statistics.fmean(plan.mean_layers for plan in plans),
            mean_exits=statistics.fmean(plan.mean_exits for plan in plans),
        )
        return per_token * data.tokens_per_step


def train_config(session: Session, size: str, mode: str) -> Any:
    """Return the configuration of an arm: dense, exits, or exits and dropout."""
    from loss.curriculum import CurriculumConfig
    from models.layer_dropout import LayerDropoutConfig
    from train.config.config import TrainConfig
    from train.loop.data_config import DataConfig
    from train.optimizer.optim import OptimConfig

    model = SIZES["tiny" if session.tiny else size]
    rows = 4 if session.tiny else ROWS[size]
    recipe: dict[str, Any] = {}
    if mode != "dense":
        recipe["curriculum"] = CurriculumConfig(C="rot", R=max(model.n_layers - 1, 1))
    if mode == "exits and dropout":
        recipe["layer_dropout"] = LayerDropoutConfig(p_max=0.1, S="constant")
    return TrainConfig(
        name="gpu",
        steps=1000,
        model=model,
        data=DataConfig(
            path="none", seq_len=model.max_seq_len, global_batch_size=2 * rows, microbatch_size=rows
        ),
        optim=OptimConfig(lr=1e-4),
        **recipe,
    )


def syncs(session: Session) -> dict[str, object]:
    """Count the lines of a step at which the host waits for the device."""
    trainer = Trainer(session, "110m", "exits and dropout")
    trainer.step()
    if not session.on_gpu:
        session.row("host syncs in a step", "needs CUDA")
        return {"outcome": "needs CUDA"}
    session.wait()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step()
    torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    session.row("host syncs in a step", f"{sum(lines.values())}: {dict(lines)}"[:200])
    return {"syncs": dict(lines)}


def saves(session: Session) -> dict[str, object]:
    """Save twice in the background, resume into another model, and compare bit by bit."""
    from train.checkpoints.checkpoint_config import CheckpointConfig
    from train.checkpoints.checkpointer import CheckpointWriter
    from train.checkpoints.content import RunIdentity, training_tensors
    from train.checkpoints.resume import resume

    trainer, other = (Trainer(session, "110m", "exits") for _ in range(2))
    tokenizer = session.folder / "tokenizer.model"
    tokenizer.write_bytes(b"none")
    config = CheckpointConfig(asynchronous=True)
    fields = {"name": "gpu", "steps": 1000, "optim": {"lr": 1e-4}}
    identity = RunIdentity(trainer.config.model, fields, tokenizer, "none", "none")
    how = {"config": config, "identity": identity, "runtime": session.runtime}
    folder = session.folder / "checkpoints"
    with CheckpointWriter(folder, trainer.model, trainer.optimizer, **how) as writer:
        for _ in range(2):
            trainer.step()
            writer.save(trainer.t, {})
        writer.wait()
    resumed = resume(folder, other.model, other.optimizer, **how)
    assert resumed.t == 2, f"resumed at step {resumed.t} and not 2"
    pairs = [training_tensors(x.model, x.optimizer) for x in (trainer, other)]
    same = all(
        torch.equal(local_part(value), local_part(pairs[1][part][name]))
        for part, values in pairs[0].items()
        for name, value in values.items()
    )
    session.row("two asynchronous saves, then a resume", "the same bits" if same else "OTHER BITS")
    assert same, "what was loaded is not what was saved"
    return {"same_bits": same}


def mfu(session: Session, size: str) -> dict[str, object]:
    """Time the step of a size: dense, exits, exits and dropout, the last compiled too."""
    from train.parallel.titan import get_peak_flops

    peak = get_peak_flops(torch.cuda.get_device_name()) if session.on_gpu else None
    found: dict[str, object] = {}
    for mode, compiles in (
        ("dense", False),
        ("exits", False),
        ("exits and dropout", False),
        ("exits and dropout", True),
    ):
        name = f"{size} {mode}{', compiled' * compiles}"
        if session.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(session, size, mode, compiles=compiles)
        warm, timed = (1, 2) if session.tiny else (WARM, TIMED)
        flops = trainer.flops(range(warm, warm + timed))
        seconds = session.seconds(trainer.step, warm=warm, times=timed)
        tokens = trainer.config.data.tokens_per_step / seconds
        share = flops / seconds / peak if peak else None
        gib = session.runtime.peak_memory_bytes() / 2**30
        planned = planned_gib(trainer.config)
        found[name] = {
            "tokens_per_second": tokens,
            "mfu": share,
            "peak_gib": gib,
            "planned_gib": planned,
        }
        speed = f"MFU {share:.1%}" if share else f"{flops / seconds / 1e9:.2f} GFLOP/s"
        memory = f"{1024 * gib:,.0f} MiB"
        memory += f" (--dry_run: {1024 * planned:,.0f})" if planned else ""
        session.row(name, f"{tokens:,.0f} tokens/s, {speed}, {memory}")
        del trainer
        if session.on_gpu:
            torch.cuda.empty_cache()
    return found


def profile_step(session: Session) -> dict[str, object]:
    """Profile one eager step of 110M and list the 25 operations that take most."""
    from torch.profiler import ProfilerActivity, profile

    trainer = Trainer(session, "110m", "exits and dropout")
    trainer.step()
    session.wait()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * session.on_gpu
    with profile(activities=kinds) as found:
        trainer.step()
        session.wait()
    key = "self_device_time_total" if session.on_gpu else "self_cpu_time_total"
    operations = [e for e in found.key_averages() if not e.is_user_annotation]
    events = sorted(operations, key=lambda event: -getattr(event, key))[:25]
    top = [{"name": e.key, "ms": getattr(e, key) / 1e3, "calls": e.count} for e in events]
    for row in top:
        print(f"  {row['ms']:10.3f} ms {row['calls']:6d} x {row['name'][:80]}", flush=True)
    session.row("most of a 110M step", str(top[0]["name"])[:60])
    return {"top": top}
