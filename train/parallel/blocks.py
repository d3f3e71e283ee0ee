"""Transform every block before it is sharded: float8, activation checkpointing, compile.

In this order. Each changes how a block computes and nothing else: parameters keep their names, so
checkpoints, moments and initial weights are the same with and without. Modules are imported where
they are needed.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from models.attention_mask import allow_graphs
from models.block import TransformerBlock
from models.config import LlamaConfig
from models.llama import Llama


def float8_problems(model: LlamaConfig) -> list[str]:
    """Return a line for each width of the blocks that float8 does not support."""
    widths = {
        "dim": model.dim,
        "ffn_dim": model.ffn_dim,
        "n_heads * head_dim": model.n_heads * model.head_width,
        "n_kv_heads * head_dim": model.n_kv_heads * model.head_width,
    }
    if model.head_dim is None:
        del widths["n_heads * head_dim"]  # dim
    return [
        f"model.{name}: {width}, parallel.float8 needs a multiple of 16"
        for name, width in widths.items()
        if width % 16
    ]


def convert_blocks_to_float8(model: Llama, device: torch.device) -> None:
    """Multiply the blocks' matrices in float8, scaled by tensor; weights keep their dtype.

    Modifies the model.

    Raises:
        ValueError: If the model's widths or the device do not support it.
    """
    found = float8_problems(model.config)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found.append(
            f"parallel.float8: {device} has no float8 units (compute capability 8.9 or newer), "
            "set it to False"
        )
    if found:
        raise ValueError("\n".join(found))
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Weight gradients sum over tokens, 16 at a time; a layer that keeps no row runs on one token.
    convert_to_float8_training(model.layers, config=Float8LinearConfig(pad_inner_dim=True))


class CheckpointedBlock(TransformerBlock):
    """A block that recomputes in its backward what `checkpoint_function` does not keep."""

    checkpoint_function: Callable[..., Tensor]

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Run the block within `checkpoint_function`."""
        return self.checkpoint_function(super().forward, *inputs)


def checkpoint_blocks(model: Llama, mode: Literal["full", "selective"]) -> None:
    """Recompute in each block's backward what `mode` does not keep; modifies the model."""
    from train.parallel.titan import activation_checkpointing

    activation_checkpointing(mode).apply(model)
    for l, wrapper in list(model.layers.items()):
        # torchtitan's wrapper would add its own name to every parameter's, so only its function
        # is used. The block changes its class, as it does under fully_shard.
        block, function = wrapper._checkpoint_wrapped_module, wrapper.checkpoint_fn
        assert isinstance(block, TransformerBlock)
        block.__class__ = CheckpointedBlock
        block.checkpoint_function = function
        model.layers[l] = block


_KV = 3
"""Where a block's `kv` is among its inputs after h."""


class CompiledForward:
    """A compiled stand-in for a block's forward; each graph is made when its shapes first come."""

    def __init__(self, block: Module) -> None:
        self._eager = block.forward
        self._compiled = torch.compile(block.forward, fullgraph=True)

    def __call__(self, h: Tensor, *inputs: Any) -> Tensor:
        """Run the block on h: (batch, seq, dim).

        Raises:
            ValueError: torch's compiler fails.
        """
        # The one token of a layer that keeps no row is not worth a graph. Compiled, it would make
        # the length of a row dynamic too, in every graph after it; so would rows that are decoded,
        # with keys and values kept.
        decodes = len(inputs) > _KV and inputs[_KV] is not None
        run = self._eager if decodes or h.shape[:2] == (1, 1) else self._compiled
        try:
            return run(h, *inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(
                f"parallel.compile: torch's compiler failed ({str(error).strip().splitlines()[0]}),"
                " set it to False, or mend that; on a CPU it needs a C++ compiler, which CXX may "
                "name"
            ) from error


def compile_blocks(model: Llama) -> None:
    """Compile each block when it first runs; blocks of one shape share their graphs.

    Stochastic depth changes the number of rows: the second number makes a graph for any, but for
    one row, which torch takes apart. So training has three graphs at most, with documents and
    checkpointing too, and validation, without gradients, two; FlexAttention's blocks for a router's
    queries may be laid out otherwise for whole batches, which makes one more. With `fullgraph`,
    torch raises at its limit of recompilations, where it otherwise runs uncompiled.
    """
    allow_graphs()
    for block in model.layers.values():
        block.forward = CompiledForward(block)
