"""Greedy continuations, and the token that every exit predicts along them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.engine.generation import Generation
from inference.strategies.autoregressive import Autoregressive
from models.llama import Llama


def record_continuations(
    model: Llama,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_tokens: Sequence[int] = (),
) -> tuple[list[list[int]], list[Tensor]]:
    """Decode greedily with all layers, and return what every exit predicts along the way.

    Returns:
        Each prompt with its continuation, and its `record_exits` from the prompt's end.
    """
    whole = Generation(
        model,
        prompts,
        Autoregressive(),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_tokens=stop_tokens,
    ).finish()
    rows = [prompt + tokens for prompt, tokens in zip(whole.prompts, whole.tokens, strict=True)]
    traces = [
        record_exits(model, row, len(prompt))
        for row, prompt in zip(rows, whole.prompts, strict=True)
    ]
    return rows, traces


@torch.inference_mode()
def record_exits(model: Llama, row: list[int], first: int) -> Tensor:
    """Return the most probable token of every exit along a row: (L, tokens) int64.

    Args:
        model: In eval mode.
        row: A prompt and its greedy continuation.
        first: Length of the prompt.
    """
    L = model.config.n_layers
    h = model.embed(torch.tensor([row], device=model.norm.weight.device))
    _, exits = model.run_layers(h, 0, L, exit_layers=range(L))
    choices = [model.exit_logits(exits[l][0, first - 1 : -1], l + 1).argmax(-1) for l in range(L)]
    return torch.stack(choices).cpu()
