"""How probable a text is under the full model."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from models.llama import Llama


@torch.inference_mode()
def read_continuation(
    model: Llama, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[float, int]:
    """Run the full model over a continuation, each token predicted from those before it.

    Args:
        model: In eval mode.
        prompt: Token ids, at least one.
        tokens: The continuation, by whichever strategy.

    Returns:
        Its log likelihood in nats, and how many of its tokens the model finds most probable.
    """
    device = model.norm.weight.device
    row = torch.tensor([[*prompt, *tokens]], device=device)
    h, _ = model.run_layers(model.embed(row[:, :-1]), 0, model.config.n_layers)
    logits = model.exit_logits(h[0, len(prompt) - 1 :]).float()
    labels = row[0, len(prompt) :]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return -float(loss), int((logits.argmax(-1) == labels).sum())
