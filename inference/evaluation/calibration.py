"""How far a score in [0, 1] is a probability: cases in bins, and the expected calibration error."""

import torch
from torch import Tensor

BINS = 15


def bin_scores(scores: Tensor, labels: Tensor) -> Tensor:
    """Sort cases by their score, in [0, 1], into bins of equal width.

    Args:
        scores: Any shape.
        labels: Same shape, bool.

    Returns:
        (BINS, 3) fp64: of the cases in (b / BINS, (b + 1) / BINS] their number, the sum of their
        scores, and how many are true.
    """
    scores, true = scores.flatten(), labels.flatten()
    index = (scores * BINS).ceil().long().clamp(1, BINS) - 1
    values = torch.stack((torch.ones_like(scores), scores, true.to(scores.dtype)), dim=1).double()
    return values.new_zeros(BINS, 3).index_add_(0, index, values)


def calibration_error(bins: Tensor) -> float:
    """Return the expected calibration error (Guo et al., arXiv 1706.04599, eq. 3).

    ECE = sum_b (n_b / n) |share of true cases_b - mean score_b|, of what `bin_scores` counted.
    """
    return float((bins[:, 2] - bins[:, 1]).abs().sum() / bins[:, 0].sum())


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
