"""Parallelism, applied to the model from outside: device mesh, FSDP2, initial weights.

Each block is one FSDP unit. Embedding, final norm and LM head stay in the root unit, which is
gathered once and reduced once per microbatch however many exits a step has, tied or not.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.config import LlamaConfig
from models.llama import Llama
from train.runtime import Runtime
from train.titan import ParallelDims

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the ranks."""

    dp_replicate: int = 1
    """Copies of the sharded model (HSDP); 1 is plain FSDP."""
    param_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What weights are gathered and computed in; the optimizer's own stay fp32. auto: bfloat16 on
    GPUs, float32 on CPUs, many of which compute bfloat16 ten times slower."""
    reduce_dtype: Literal["bfloat16", "float32"] = "float32"
    """What gradients are summed over ranks in."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward (ZeRO-3). False keeps them until its
    backward (ZeRO-2): fewer all-gathers, more memory. The root unit always keeps its own."""

    def problems(self, world_size: int) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        if self.dp_replicate < 1 or world_size % self.dp_replicate:
            return [
                f"parallel.dp_replicate: {self.dp_replicate} does not divide the {world_size} "
                "ranks, choose a divisor"
            ]
        return []


def build_mesh(config: ParallelConfig, runtime: Runtime) -> DeviceMesh:
    """Return the mesh to shard over: 1-D (FSDP) or 2-D (replicate x shard, HSDP)."""
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
    model_config: LlamaConfig, config: ParallelConfig, runtime: Runtime, seed: int
) -> Llama:
    """Build the model on the meta device, shard it, then give each rank its part of the weights."""
    with torch.device("meta"):
        model = Llama(model_config)
    shard(model, config, build_mesh(config, runtime))
    model.to_empty(device=runtime.device)
    model.init_weights(seed, write=_write_shard)
    return model


def shard(model: Llama, config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Make each block, and the rest as the root, a unit of FSDP2, in place."""
    param_dtype = config.param_dtype
    if param_dtype == "auto":
        param_dtype = "bfloat16" if mesh.device_type == "cuda" else "float32"
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[param_dtype], reduce_dtype=DTYPES[config.reduce_dtype]
    )
    for block in model.layers.values():
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=config.reshard_after_forward,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def set_gradient_sync(model: Llama, sync: bool) -> None:
    """Reduce gradients over ranks in the next backward, or leave that to a later microbatch."""
    model.set_requires_gradient_sync(sync)  # type: ignore[operator]
    model.set_is_last_backward(sync)  # type: ignore[operator]


def _write_shard(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full`, which every rank has drawn alike."""
    assert isinstance(parameter, DTensor)
    parameter.copy_(
        distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    )
