"""How well a score decides where tokens may exit: measures over exits and tokens.

A score is (exits, tokens); a token exits at the first exit whose score reaches a threshold, at the
last layer if none does. Imports no model.
"""

import torch
from torch import Tensor


def area_under_roc(scores: Tensor, labels: Tensor) -> float:
    """Return the chance that a true case scores above a false one, ties counting half.

    Args:
        scores: Any shape.
        labels: Same shape, bool.

    Returns:
        Not a number if all labels are the same.
    """
    _, index, counts = scores.flatten().unique(return_inverse=True, return_counts=True)
    # Ranks from 1; equal scores share the mean of theirs.
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[index]
    true = labels.flatten()
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        return float("nan")
    above = ranks[true].sum().item() - positives * (positives + 1) / 2
    return above / (positives * negatives)


def depths_at(scores: Tensor, threshold: float, exits: range, n_layers: int) -> Tensor:
    """Return the layers each token takes, (tokens,) int64."""
    sure = scores >= threshold  # (exits, tokens)
    first = torch.tensor([*exits])[sure.int().argmax(0)]
    return torch.where(sure.any(0), first, n_layers)


def agreement_at(depths: Tensor, agrees: Tensor, exits: range, n_layers: int) -> float:
    """Return the share of tokens whose exit predicts the last layer's token.

    Args:
        depths: (tokens,) int64, each an exit or n_layers.
        agrees: (exits, tokens) bool.
        exits: The E of the rows of `agrees`.
        n_layers: L.
    """
    right = depths == n_layers
    for E, here in zip(exits, agrees, strict=True):
        right = right | ((depths == E) & here)
    return right.double().mean().item()


def curve(
    scores: Tensor, agrees: Tensor, exits: range, n_layers: int, points: int = 200
) -> list[tuple[float, float]]:
    """Return (mean depth, agreement) at thresholds from none reached to all, depth ascending.

    Thresholds are quantiles of the scores.
    """
    ordered = scores.flatten().sort().values
    ranks = torch.linspace(0, len(ordered) - 1, points).long()
    thresholds = [*ordered[ranks].unique().tolist(), float("inf")]
    found = []
    for threshold in thresholds:
        depths = depths_at(scores, threshold, exits, n_layers)
        mean = depths.double().mean().item()
        found.append((mean, agreement_at(depths, agrees, exits, n_layers)))
    return found


def agreement_at_depth(points: list[tuple[float, float]], depth: float) -> float:
    """Return the agreement of a curve at a mean depth, linear between its points.

    Drawing between the thresholds of two points, token by token, reaches it.
    """
    below = max((p for p in points if p[0] <= depth), default=points[0])
    above = min((p for p in points if p[0] >= depth), default=points[-1])
    if above[0] <= below[0]:
        return max(below[1], above[1])
    return below[1] + (above[1] - below[1]) * (depth - below[0]) / (above[0] - below[0])


def best_agreement(agrees: Tensor, exits: range, n_layers: int, depth: float) -> float:
    """Return the most agreement any choice of exits can have at a mean depth: the oracle.

    Every token takes the first exit at least; the layers left are spent on the tokens that need
    the fewest more to agree.

    Args:
        agrees: (exits, tokens) bool.
        exits: The E of its rows.
        n_layers: L.
        depth: Mean layers of a token, at least the first exit.
    """
    every = torch.cat((agrees, torch.ones_like(agrees[:1])))
    least = torch.tensor([*exits, n_layers])[every.int().argmax(0)]  # (tokens,)
    extra = (least - exits.start).sort().values.double().cumsum(0)
    budget = (depth - exits.start) * len(least)
    served = int((extra <= budget + 1e-6).sum())
    share = 0.0
    if served < len(least):
        before = extra[served - 1].item() if served else 0.0
        share = max(0.0, budget - before) / (extra[served].item() - before)
    return (served + share) / len(least)
