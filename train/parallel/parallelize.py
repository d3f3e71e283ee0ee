"""Parallelism, applied to the model from outside: device mesh, FSDP2, initial weights.

Under FSDP2 each block is one unit. Embedding, final norm and LM head stay in the root unit, which
is gathered once a step however many exits it has, tied or not. So do the norms of exits' own parts;
where these have feed-forward layers too, each exit's parts are a unit, which a step without that
exit calls on no rank, and whose gradients are then None.

A small model is not sharded: every rank holds plain weights, and a step sums their gradients once.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module

from models.config import LlamaConfig
from models.flops import total_params
from models.llama import Llama
from train.parallel.blocks import checkpoint_blocks, compile_blocks, convert_blocks_to_float8
from train.parallel.runtime import Runtime
from train.parallel.titan import ParallelDims

Trains = Literal["all", "exits"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHOLE_BYTES = 2**31
"""The most of weights, gradients and moments that every rank holds whole where it may choose."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is sharded, and what it trades memory for."""

    shard: Literal["auto", "blocks", "none"] = "auto"
    """blocks: FSDP2, each block a unit. none: every rank holds the whole model in float32 (DDP) and
    sums gradients once a step, in one all-reduce. auto: none where the model's weights, gradients
    and moments take at most 2 GiB, or every rank holds them whole in any case; blocks where another
    setting needs FSDP2, as bfloat16 does. The log names the choice. Under none,
    reshard_after_forward and reduce_every_microbatch have nothing to do."""
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
        if self.shard == "none" and (needs := self._needs_fsdp(world_size)):
            found.append(f"parallel.shard: none does not go with {needs}, set it to blocks")
        if self.float8 and find_spec("torchao") is None:
            found.append("parallel.float8: torchao is not installed, pip install -e .[float8]")
        return found

    def settled(self, model: LlamaConfig, world_size: int, *, on_gpu: bool) -> "ParallelConfig":
        """Return the configuration with what its `auto` and None come to, and dp_replicate too.

        Args:
            model: The model to be sharded.
            world_size: Number of ranks.
            on_gpu: Whether they compute on GPUs.
        """
        fits = 16 * total_params(model) <= WHOLE_BYTES and self.dp_replicate == 1
        whole = self.shard == "none" or (
            self.shard == "auto"
            and not self._needs_fsdp(world_size)
            and not (on_gpu and self.param_dtype == "auto")
            and (fits or self.dp_replicate == world_size)
        )
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if on_gpu and not whole else "float32"
        return replace(
            self,
            shard="none" if whole else "blocks",
            dp_replicate=world_size if whole else self.dp_replicate,
            param_dtype=dtype if self.param_dtype == "auto" else self.param_dtype,
            compile=on_gpu if self.compile is None else self.compile,
        )

    def _needs_fsdp(self, world_size: int) -> str:
        """Return the first setting that plain weights do not have; empty when there is none."""
        needs = {
            "parallel.param_dtype bfloat16": self.param_dtype == "bfloat16",
            "parallel.reduce_dtype bfloat16": self.reduce_dtype == "bfloat16",
            "parallel.cpu_offload": self.cpu_offload,
            "parallel.float8": self.float8,
            f"parallel.dp_replicate {self.dp_replicate}": 1 < self.dp_replicate < world_size,
        }
        return next((name for name, needed in needs.items() if needed), "")


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
    config = config.settled(model_config, runtime.world_size, on_gpu=runtime.device.type == "cuda")
    with torch.device("meta"):
        model = Llama(model_config)
    freeze(model, trains)
    if config.float8:
        convert_blocks_to_float8(model, runtime.device)
    if config.activation_checkpointing != "none":
        checkpoint_blocks(model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(model)
    if config.shard == "blocks":
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
    """Make each block, and the rest as the root, a unit of FSDP2; modifies the model.

    Args:
        model: On the meta device.
        config: With its `auto` settled.
        mesh: From `build_mesh`.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.param_dtype], reduce_dtype=DTYPES[config.reduce_dtype]
    )
    pinned = mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if config.cpu_offload else OffloadPolicy()
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
    """Set whether the next backward reduces gradients over the ranks; plain weights never do.

    The sum over replicas of the sharded model (HSDP, DDP) follows the last microbatch alone. Only
    then are weights freed that are kept from forward to backward: a step gathers them once.

    Args:
        model: From `build_model`.
        exit_layers: Layers l of the exits of the step, the same on every rank.
        is_last: Whether it is the last microbatch of the step.
        every_microbatch: ParallelConfig.reduce_every_microbatch.
        reshard_after_forward: ParallelConfig.reshard_after_forward.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last or every_microbatch)
    model.set_requires_all_reduce(is_last)
    model.set_is_last_backward(is_last)
    model.set_reshard_after_backward(is_last or reshard_after_forward)
    model.set_reshard_after_backward(is_last, recurse=False)
    for unit in _unused_units(model, exit_layers):
        # FSDP2 raises where a unit that was never called is to keep its gradients.
        unit.set_requires_gradient_sync(True, recurse=False)  # type: ignore[operator]


@torch.no_grad()
def average_gradients(model: Llama, runtime: Runtime) -> None:
    """Average the gradients of plain weights over the ranks, as FSDP2's backward does, in one sum.

    The ranks have gradients of the same weights: which exits a step has is known to all.
    """
    if isinstance(model, FSDPModule) or runtime.world_size == 1:
        return
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    flat = torch.cat([grad.reshape(-1) for grad in grads.values()])
    runtime.sum_over_ranks(flat).div_(runtime.world_size)
    for p, part in zip(grads, flat.split([p.numel() for p in grads]), strict=True):
        p.grad = part.view_as(p)


def _unused_units(model: Llama, exit_layers: Collection[int]) -> list[Module]:
    """Return the units that a step with these exits does not call."""
    deepest = max(exit_layers, default=-1)
    unused = [block for l, block in model.layers.items() if int(l) > deepest]
    if model.config.own_exit_mlp:
        unused += [parts for E, parts in model.own_exits.items() if int(E) - 1 not in exit_layers]
    return unused


def _write_shard(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full`, which every rank has drawn alike."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = distribute_tensor(full, mesh, placements, src_data_rank=None)
    parameter.copy_(full)
