"""A smaller plain Llama out of a bigger one: some of its layers, or without exits' own parts."""

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from models.config import LlamaConfig

EVERY_OTHER = "every_other"


def layers_to_keep(text: str, n_layers: int) -> list[int]:
    """Return the layer indices l that an option selects.

    Args:
        text: "every_other" or indices such as "0,2,5". Every other one keeps l = 0, 2, 4, ... as
            the strategy `pruned` does (LayerDrop, arXiv 1909.11556, drops l = 0, 2, ... instead).
        n_layers: L of the model.

    Raises:
        ValueError: If they are not indices in ascending order.
    """
    if text == EVERY_OTHER:
        return list(range(0, n_layers, 2))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"layers: {text!r}, give {EVERY_OTHER} or indices such as 0,2,5")
    return [int(word) for word in text.split(",")]


def prune(
    config: LlamaConfig, state: dict[str, Tensor], keep: Sequence[int]
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Return the model that has the layers `keep` alone; tensors are shared.

    Args:
        config: The shape of the whole model.
        state: Its parameters.
        keep: Layer indices l to keep, ascending. The first E of a model trained with early exits
            are its exit of E layers, and a draft model for it.

    Raises:
        ValueError: If they are not layers of the model in ascending order, or its exits have parts
            of their own, which belong to a number of layers.
    """
    if config.own_exits:
        raise ValueError(
            f"layers: exits after {', '.join(map(str, config.own_exits))} of all layers have parts "
            "of their own, give --drop_own_exits to leave them out as well"
        )
    if (
        not keep
        or list(keep) != sorted(set(keep))
        or not 0 <= keep[0] <= keep[-1] < config.n_layers
    ):
        raise ValueError(
            f"layers: {','.join(map(str, keep)) or 'none'}, give some of "
            f"0 to {config.n_layers - 1} in ascending order"
        )
    new_index = {l: index for index, l in enumerate(keep)}
    kept = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(layers|routers)\.(\d+)\.(.*)", name)
        if match is None:
            kept[name] = tensor
        elif int(match[2]) in new_index:
            kept[f"{match[1]}.{new_index[int(match[2])]}.{match[3]}"] = tensor
    return replace(config, n_layers=len(keep)), kept


def drop_own_exits(
    config: LlamaConfig, state: dict[str, Tensor]
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Return the model without the own parts of its exits: a plain Llama.

    Tensors are shared. Every exit reads through the final norm again, as the last layer does.

    Raises:
        ValueError: If no exit has parts of its own.
    """
    if not config.own_exits:
        raise ValueError("drop_own_exits: no exit of this model has parts of its own, leave it out")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("own_exits.")}
    return replace(config, own_exits=(), own_exit_mlp=False), kept
