"""Whether two strategies wrote the same tokens, and if not, whether rounding or a fault decided."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import torch

from models.llama import Llama

Difference = Literal["tie", "fault"]

_ROUNDINGS = 4.0
"""Steps of the dtype, relative to the largest logit, within which two logits are a tie."""


def same_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Return the share of equal tokens; where one row goes on, its tokens are equal to none."""
    rows = zip(ours, theirs, strict=True)
    pairs = [pair for a, b in rows for pair in zip_longest(a, b)]
    return sum(a == b for a, b in pairs) / len(pairs)


@torch.inference_mode()
def first_difference(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
) -> Difference | None:
    """Return what the first differences of greedy continuations are, the worst of all rows.

    What follows a first difference is decided by it, and says nothing more.

    Args:
        model: In eval mode.
        prompts: Token ids, a list for each row.
        ours: Continuations by one strategy.
        theirs: Those of plain decoding.

    Returns:
        tie: the full model's logits of the two tokens are equal within rounding; fault: they are
        not; None: there is no difference.
    """
    found: Difference | None = None
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            if len(a) != len(b):
                return "fault"
            continue
        row = torch.tensor([[*prompt, *b[:at]]], device=model.norm.weight.device)
        h, _ = model.run_layers(model.embed(row), 0, model.config.n_layers)
        logits = model.exit_logits(h[0, -1:])[0]
        pair = logits[[a[at], b[at]]].float()
        largest = logits[logits.isfinite()].abs().max().float()
        if not (pair[0] - pair[1]).abs() <= _ROUNDINGS * torch.finfo(logits.dtype).eps * largest:
            return "fault"
        found = "tie"
    return found
