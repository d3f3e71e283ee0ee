"""The memory of one rank, measured in the real training step on tensors without data.

Model, sharding, loss and step are those of training, under torch's FakeTensorMode and a process
group that sends nothing, so it needs neither weights nor GPUs nor other ranks. Memory outside of
tensors is left out: the CUDA context, NCCL's buffers, the allocator's fragmentation.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data.loader import Microbatch
from loss.early_exit import EarlyExitConfig, early_exit_loss
from models.config import LlamaConfig
from models.llama import Llama
from train.loop.layerskip import StepPlan
from train.loop.step import StepConfig, train_step
from train.optimizer.optim import Optimizers, build_optimizer
from train.parallel.blocks import checkpoint_blocks
from train.parallel.parallelize import ParallelConfig, freeze, shard
from train.parallel.runtime import Runtime
from train.planning.allocations import AllocationTracker, Peak, find_peak
from train.planning.gpu_kernels import gpu_kernels

PARTS = {
    "torch.distributed.fsdp": "gathered weights",
    "torch.optim": "update",
    "torch.autograd.graph": "backward",
    "train.optimizer.weight_average": "average",
    "train.parallel": "backward",
    "loss": "loss and head",
    "models": "activations",
    # DTensor computes here the shapes of an operator on whole tensors.
    "torch.distributed.tensor._sharding_prop": None,
}
"""{module: the part of the memory that it allocates; None: left out}."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one rank in a step."""

    model: LlamaConfig
    parallel: ParallelConfig
    step: StepConfig
    plan: StepPlan
    rows: int
    """Sequences per microbatch."""
    seq_len: int
    microbatches: int
    """Microbatches per step."""
    ranks: int


@dataclass(frozen=True)
class Need:
    """The memory and communication of one rank."""

    device: Peak
    """Memory of its device."""
    host_bytes: int
    """Host memory, with parallel.cpu_offload."""
    collective_bytes: Mapping[str, int]
    """{collective: bytes of the larger of input and output in one step}."""


def measure(work: Work, *, on_gpu: bool) -> Need:
    """Run one rank's build, training steps and validation without data; return their memory.

    Args:
        work: The work of the rank.
        on_gpu: Plan for GPUs, their kernels and dtype; False: for CPUs.
    """
    parallel = work.parallel.settled(work.model, work.ranks, on_gpu=on_gpu)
    parallel = replace(parallel, compile=False, float8=False, cpu_offload=False)
    runtime = Runtime(rank=0, world_size=work.ranks, device=torch.device("cpu"), job="")
    samples = torch.arange(work.rows)  # has data, for layer dropout draws on the host
    tracker = AllocationTracker(PARTS)
    with _fake_ranks(work.ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # There FlexAttention's blocks stand for the mask of a window, which is a tensor on CPUs.
        shape = replace(work.model, sliding_window=None) if on_gpu else work.model
        model = _build(work, shape, parallel)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, tracker, gpu_kernels() if on_gpu else nullcontext():
            tracker.only_part = "parameters"
            model.to_empty(device="cpu")
            tracker.only_part, built = None, tracker.now
            optimizer = build_optimizer(model, work.step.optim)
            before = _track_gradients(tracker, model, optimizer)
            batch = _microbatch(work, samples)
            # The second microbatch stands for all between the first and the last.
            batches = [batch] * min(work.microbatches, 3)
            train_step(model, optimizer, batches, work.plan, 0, config=work.step, runtime=runtime)
            collectives = tracker.collective_bytes.copy()
            _validate(model, batch, work.step.early_exit.chunk_rows)
    if further := work.microbatches - len(batches):
        for name, moved in (before[2] - before[1]).items():
            collectives[name] += further * moved
    return _need(tracker, built, work.parallel.cpu_offload, collectives)


@contextmanager
def _fake_ranks(ranks: int) -> Iterator[None]:
    """Form a process group of `ranks` as rank 0, without the others."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=store, rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _mesh(parallel: ParallelConfig, ranks: int) -> DeviceMesh:
    """Return the mesh of `build_mesh`, of CPUs also on a machine with GPUs."""
    if parallel.dp_replicate == 1:
        return init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    shape = (parallel.dp_replicate, ranks // parallel.dp_replicate)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "fsdp"))


def _build(work: Work, shape: LlamaConfig, parallel: ParallelConfig) -> Llama:
    """Build the model as `build_model` does, up to the allocation of weights."""
    with torch.device("meta"):
        model = Llama(shape)
    freeze(model, work.step.optim.trains)
    if parallel.activation_checkpointing != "none":
        checkpoint_blocks(model, parallel.activation_checkpointing)
    if parallel.shard == "blocks":
        shard(model, parallel, _mesh(parallel, work.ranks))
    return model


def _track_gradients(
    tracker: AllocationTracker, model: Llama, optimizer: Optimizers
) -> list[Counter[str]]:
    """Reassign what a backward pass leaves live to the gradients.

    Returns:
        The bytes that collectives had moved before each forward pass, filled while those run.
    """
    backward = {"backward", "gathered weights", "loss and head"}
    before: list[Counter[str]] = []
    began = 0  # of the backward pass: weights that stay gathered over microbatches are older

    def before_forward(*_: object) -> None:
        tracker.move(backward, "unreduced gradients", began)
        before.append(tracker.collective_bytes.copy())

    def after_forward(*_: object) -> None:
        nonlocal began
        began = tracker.now

    def before_update(*_: object) -> None:
        tracker.move(backward, "gradients", began)
        tracker.move({"unreduced gradients"}, "gradients", 0)  # plain ones are accumulated in place

    model.register_forward_pre_hook(before_forward, prepend=True)
    model.register_forward_hook(after_forward)
    for inner in optimizer:
        inner.register_step_pre_hook(before_update)
    return before


def _microbatch(work: Work, samples: Tensor) -> Microbatch:
    tokens = torch.zeros(work.rows, work.seq_len, dtype=torch.int64)
    return Microbatch(tokens, tokens, samples)


@torch.no_grad()
def _validate(model: Llama, batch: Microbatch, chunk_rows: int) -> None:
    """Compute the loss of every exit on one batch, as `validate` does."""
    weights = dict.fromkeys(range(model.config.n_layers), 0.0)
    hidden = model(batch.tokens, exit_layers=weights)
    config = EarlyExitConfig(chunk_rows=chunk_rows)
    early_exit_loss(hidden.exits, model.head_weight, batch.labels, weights, config=config)


def _need(
    tracker: AllocationTracker, built: int, cpu_offload: bool, collectives: Mapping[str, int]
) -> Need:
    """Separate the memory of device and host, in any step but the first."""
    for allocation in tracker.allocations:
        if allocation.part == "update" and allocation.end is None:
            # Allocated in the first step's update and live ever since.
            allocation.part, allocation.begin = "moments", built
    host = {"parameters", "gradients", "moments", "average"} if cpu_offload else set()
    on_host = [a for a in tracker.allocations if a.part in host]
    on_device = [a for a in tracker.allocations if a.part not in host]
    return Need(find_peak(on_device, built), find_peak(on_host, built).total, collectives)
