"""How far an exit is to be trusted: its confidence beside its accuracy, a text beside the model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.evaluation.rule_quality import bin_scores
from models.llama import Llama


def bin_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `bin_scores` of predictions, the largest probability their score.

    Args:
        logits: (tokens, vocab) fp32.
        labels: (tokens,) int64.
    """
    confidence, choice = logits.softmax(-1).max(-1)
    return bin_scores(confidence, choice == labels)


def mean_confidence(bins: Tensor) -> float:
    """Return the mean largest probability."""
    return float(bins[:, 1].sum() / bins[:, 0].sum())


@torch.inference_mode()
def read_continuation(
    model: Llama, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[float, int]:
    """Let the full model read a continuation, each token after those before it.

    Args:
        model: In eval mode.
        prompt: Token ids, at least one.
        tokens: The continuation, whichever way it came about.

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
