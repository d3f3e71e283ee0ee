"""A tiny model that is trained without data: step t's gradients are drawn from t alone.

So a run's end does not depend on the number of ranks, and can be computed without running it.
"""

import hashlib
from dataclasses import replace

import torch

from models.config import LlamaConfig
from tests.distributed import like, whole
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.checkpointer import CheckpointWriter
from train.checkpoints.content import RunIdentity, training_tensors
from train.checkpoints.resume import resume
from train.optimizer.optim import OptimConfig, build_optimizer
from train.parallel.parallelize import ParallelConfig, build_model

MODEL = LlamaConfig(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, vocab_size=50, max_seq_len=16
)


def build(runtime, *, shard="blocks", dp_replicate=1, optim="adamw", **shape):
    """Return a sharded model and its optimizer."""
    parallel = ParallelConfig(shard=shard, dp_replicate=dp_replicate)
    model = build_model(replace(MODEL, **shape), parallel, runtime, 0)
    return model, build_optimizer(model, OptimConfig(lr=0.01, name=optim))


def train(model, optimizer, start, stop):
    """Take steps start, ..., stop - 1."""
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        for parameter in model.parameters():
            parameter.grad = like(parameter, torch.randn(parameter.shape, generator=generator))
        optimizer.step()
        optimizer.zero_grad()


def fingerprint(model, optimizer):
    """Return a sha256 of all weights and moments, the same on every rank."""
    digest = hashlib.sha256()
    for part in training_tensors(model, optimizer).values():
        for name, value in sorted(part.items()):
            digest.update(name.encode() + whole(value).detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(folder, **config):
    """Return what the checkpoints say of the run, with a tokenizer file in `folder`."""
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(b"tokenizer")
    return RunIdentity(
        model=MODEL,
        config={"name": "tiny", "steps": 8, "optim": {"lr": 0.01}} | config,
        tokenizer_path=tokenizer,
        tokenizer_fingerprint=hashlib.sha256(b"tokenizer").hexdigest(),
        data_fingerprint="data",
    )


def writer(root, model, optimizer, runtime, *, folder=None, **config):
    """Return a writer of checkpoints into root/checkpoints, or another folder."""
    return CheckpointWriter(
        folder or root / "checkpoints",
        model,
        optimizer,
        config=CheckpointConfig(**config),
        identity=identity(root),
        runtime=runtime,
    )


def load_newest(root, model, optimizer, runtime, *, folder=None, allow=False, **config):
    """Resume from the newest checkpoint in root/checkpoints, or another folder."""
    return resume(
        folder or root / "checkpoints",
        model,
        optimizer,
        config=CheckpointConfig(allow_config_changes=allow),
        identity=identity(root, **config),
        runtime=runtime,
    )
