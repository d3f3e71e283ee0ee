"""Compiled layers: one compiled graph for each shape of a pass, kept few and fixed."""

from typing import Any

import torch
from torch import Tensor

from inference.engine.fused import FusedLayers
from models.llama import Llama

LONGEST_PASS = 32
"""Most tokens of a row in a compiled pass; longer ones, such as prompts, come once and are not
worth a graph each."""
WINDOW_STEP = 128
"""Passes that are compiled, or on a GPU, read a multiple of so many KV slots: each number of them
is a graph of the one, and of the other a plan that cuDNN's attention takes milliseconds to make."""
SMALL_WINDOW_STEP = 16
"""The same where views of a window are kept as long as it is the same."""
GRAPHS = 256
"""Most graphs of a function; more mean that shapes are not fixed, which is an error and not a slow
run."""


class CompiledLayers:
    """A compiled stand-in for `Llama.run_layers`; each graph is made when its shapes first come."""

    def __init__(self, model: Llama) -> None:
        self._eager = model.run_layers
        self._compiled = torch.compile(model.run_layers, fullgraph=True, dynamic=False)

    def __call__(self, h: Tensor, *args: Any, **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
        """Run layers on h: (batch, seq, dim), as `Llama.run_layers` does.

        Raises:
            ValueError: torch's compiler fails.
        """
        run = self._eager if h.shape[1] > LONGEST_PASS else self._compiled
        try:
            return run(h, *args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(
                f"compile: torch's compiler failed ({str(error).strip().splitlines()[0]}), leave "
                "--compile out, or mend that; on a CPU it needs a C++ compiler, which CXX may name"
            ) from error


def compile_layers(model: Llama) -> None:
    """Compile the layers of a model for inference, in place; they stay one function.

    With `fullgraph`, anything in the layers that would wait for the device is an error.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    model.run_layers = CompiledLayers(model)  # type: ignore[method-assign]


def is_compiled(model: Llama) -> bool:
    """Return whether a model's layers are compiled."""
    return isinstance(model.run_layers, CompiledLayers)


def window_step(model: Llama) -> int:
    """Return the number of KV slots that the windows of this model are multiples of."""
    if is_compiled(model) or model.norm.weight.is_cuda:
        return WINDOW_STEP
    return SMALL_WINDOW_STEP if isinstance(model.run_layers, FusedLayers) else 1
