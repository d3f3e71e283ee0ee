"""The layers compiled: one graph for each shape of a pass, kept few and fixed."""

from typing import Any

import torch
from torch import Tensor

from models.llama import Llama

LONGEST_PASS = 32
"""Tokens of a row in a compiled pass at most; longer ones, such as prompts, come once and are not
worth a graph each."""
WINDOW_STEP = 128
"""A compiled pass looks at a multiple of so many slots, as each number of them is a graph."""
GRAPHS = 256
"""More graphs than this mean that shapes are not fixed: an error, not a slow run."""


class CompiledLayers:
    """Stands in for `Llama.run_layers`."""

    def __init__(self, model: Llama) -> None:
        """Compile nothing yet: a graph is made when its shapes first come."""
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
    """Compile the layers of a model that is only to be run, in place; they stay one function.

    With `fullgraph`, anything that would make the host wait inside the layers is an error.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    model.run_layers = CompiledLayers(model)  # type: ignore[method-assign]


def is_compiled(model: Llama) -> bool:
    """Return whether a model's layers are compiled."""
    return isinstance(model.run_layers, CompiledLayers)


def window_step(model: Llama) -> int:
    """Return the multiple of slots that a pass of this model looks at."""
    return WINDOW_STEP if is_compiled(model) else 1
