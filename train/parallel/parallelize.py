"""Parallelism, applied to the model from outside: device mesh, FSDP2, initial weights.

Each block is one FSDP unit. Embedding, final norm and LM head stay in the root unit, which is
gathered once and reduced once per microbatch however many exits a step has, tied or not. So do the
norms of exits' own parts; where these have feed-forward layers too, each exit's parts are a unit,
which a step without that exit calls on no rank, and whose gradients are then None.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module

from models.config import LlamaConfig
from models.llama import Llama
from train.parallel.blocks import checkpoint_blocks, compile_blocks, convert_blocks_to_float8
from train.parallel.runtime import Runtime
from train.parallel.titan import ParallelDims

Trains = Literal["all", "exits"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is sharded, and what it trades memory for."""

    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP); 1 is plain FSDP. Equal to the number of ranks: every
    rank holds the whole model (DDP)."""
    param_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype that weights are gathered and computed in; the optimizer's copies stay fp32. auto:
    bfloat16 on GPUs, float32 on CPUs, many of which compute bfloat16 ten times slower."""
    reduce_dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype that gradients are summed over ranks in."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward (ZeRO-3). False keeps them until its
    backward (ZeRO-2): fewer all-gathers, more memory. The root unit always keeps its own."""
    reduce_every_microbatch: bool = False
    """Sum gradients over the ranks of a shard group after every microbatch, not once a step: each
    rank then holds its part of the gradient alone, for one more reduce-scatter a microbatch."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What a block keeps for its backward. full: its input, the rest is recomputed. selective: also
    every second matmul's output and, on GPUs, attention's. none: everything."""
    compile: bool | None = False
    """Compile the blocks, all into the same few graphs; None: on GPUs. Takes a minute at the start;
    needs a C++ compiler on CPUs, where it gains little."""
    cpu_offload: bool = False
    """Keep weights, gradients and moments in host memory, and update them there. Slow; for models
    that do not fit otherwise."""
    float8: bool = False
    """Multiply the blocks' matrices in float8 (torchao; compute capability 8.9, i.e. Ada or Hopper,
    or newer). The head stays in param_dtype. Faster only together with `compile`."""

    def problems(self, world_size: int) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = []
        if self.dp_replicate < 1 or world_size % self.dp_replicate:
            found.append(
                f"parallel.dp_replicate: {self.dp_replicate} does not divide the {world_size} "
                "ranks, choose a divisor"
            )
        if self.float8 and find_spec("torchao") is None:
            found.append("parallel.float8: torchao is not installed, pip install -e .[float8]")
        return found

    def compile_on(self, device: torch.device) -> bool:
        """Return whether blocks are compiled on this device."""
        return device.type == "cuda" if self.compile is None else self.compile


def build_mesh(config: ParallelConfig, runtime: Runtime) -> DeviceMesh:
    """Return the mesh to shard over: 1-D (FSDP) or 2-D (replicate x shard, HSDP and DDP)."""
    dims = ParallelDims(
        dp_replicate=config.dp_replicate,
        dp_shard=-1,
        cp=1,
        tp=1,
        pp=1,
        ep=1,
        world_size=runtime.world_size,
        spmd_backend="partial_dtensor",
    )
    dims.build_mesh()
    return dims.get_mesh(["dp_replicate", "fsdp"] if config.dp_replicate > 1 else "fsdp")


def build_model(
    model_config: LlamaConfig,
    config: ParallelConfig,
    runtime: Runtime,
    seed: int,
    *,
    trains: Trains = "all",
) -> Llama:
    """Build the model on the meta device, shard it, then initialize this rank's part of it.

    Weights that do not learn, see OptimConfig.trains, have no gradients.

    Raises:
        ValueError: If float8 is set and the device or the model's shape does not support it.
    """
    with torch.device("meta"):
        model = Llama(model_config)
    freeze(model, trains)
    if config.float8:
        convert_blocks_to_float8(model, runtime.device)
    if config.activation_checkpointing != "none":
        checkpoint_blocks(model, config.activation_checkpointing)
    if config.compile_on(runtime.device):
        compile_blocks(model)
    shard(model, config, build_mesh(config, runtime))
    model.to_empty(device="cpu" if config.cpu_offload else runtime.device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(runtime.device)
    model.init_weights(seed, write=_write_shard)
    return model


def freeze(model: Llama, trains: Trains) -> None:
    """Turn off the gradients of weights that do not learn; for before the model is sharded."""
    model.requires_grad_(trains == "all")
    model.own_exits.requires_grad_(True)


def shard(model: Llama, config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Make each block, and the rest as the root, a unit of FSDP2; modifies the model."""
    on_gpu = mesh.device_type == "cuda"
    param_dtype = config.param_dtype
    if param_dtype == "auto":
        param_dtype = "bfloat16" if on_gpu else "float32"
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[param_dtype], reduce_dtype=DTYPES[config.reduce_dtype]
    )
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
    own = model.own_exits.values() if model.config.own_exit_mlp else ()
    for unit in (*model.layers.values(), *own):
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=config.reshard_after_forward,
        )
    fully_shard(
        model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False
    )


def set_gradient_sync(
    model: Llama,
    exit_layers: Collection[int],
    is_last: bool,
    *,
    every_microbatch: bool = False,
    reshard_after_forward: bool = True,
) -> None:
    """Set whether the next backward reduces gradients over the ranks.

    The sum over replicas of the sharded model (HSDP, DDP) follows the last microbatch alone. Only
    then are weights freed that are kept from forward to backward: a step gathers them once.

    Args:
        model: From `build_model`.
        exit_layers: Layers l of the exits of the step, the same on every rank.
        is_last: Whether it is the last microbatch of the step.
        every_microbatch: ParallelConfig.reduce_every_microbatch.
        reshard_after_forward: ParallelConfig.reshard_after_forward.
    """
    model.set_requires_gradient_sync(is_last or every_microbatch)  # type: ignore[operator]
    model.set_requires_all_reduce(is_last)  # type: ignore[operator]
    model.set_is_last_backward(is_last)  # type: ignore[operator]
    model.set_reshard_after_backward(is_last or reshard_after_forward)  # type: ignore[operator]
    model.set_reshard_after_backward(is_last, recurse=False)  # type: ignore[operator]
    for unit in _unused_units(model, exit_layers):
        # FSDP2 raises where a unit that was never called is to keep its gradients.
        unit.set_requires_gradient_sync(True, recurse=False)  # type: ignore[operator]


def _unused_units(model: Llama, exit_layers: Collection[int]) -> list[Module]:
    """Return the units that a step with these exits does not call."""
    deepest = max(exit_layers, default=-1)
    unused = [block for l, block in model.layers.items() if int(l) > deepest]
    if model.config.own_exit_mlp:
        unused += [parts for E, parts in model.own_exits.items() if int(E) - 1 not in exit_layers]
    return unused


def _write_shard(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full`, which every rank has drawn alike."""
    assert isinstance(parameter, DTensor)
    parameter.copy_(
        distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    )
