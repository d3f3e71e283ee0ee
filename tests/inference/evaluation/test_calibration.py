"""Bins of scores, and how far a score is a probability, against slow forms."""

import pytest
import torch

from inference.evaluation.calibration import (
    BINS,
    bin_confidence,
    bin_scores,
    calibration_error,
    mean_confidence,
)


def test_confidence_is_the_largest_probability():
    logits = torch.tensor([[0.0, 0.0], [9.0, -9.0]])
    bins = bin_confidence(logits, torch.tensor([1, 0]))
    assert bins[:, 0].tolist() == [0] * 7 + [1] + [0] * 6 + [1]
    assert bins[14].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert mean_confidence(bins) == pytest.approx(0.75, abs=1e-6)


def test_calibration_error_is_the_sum_over_bins():
    generator = torch.Generator().manual_seed(5)
    scores, labels = (
        torch.rand(200, generator=generator),
        torch.rand(200, generator=generator) > 0.5,
    )
    scores[0], scores[1] = 0.0, 1.0
    slow = 0.0
    for b in range(BINS):
        inside = [
            i
            for i, s in enumerate(scores.tolist())
            if b / BINS < s <= (b + 1) / BINS or (b == 0 and s == 0.0)
        ]
        if inside:
            true = sum(labels[i].item() for i in inside) / len(inside)
            slow += len(inside) / 200 * abs(true - scores[inside].mean().item())
    assert calibration_error(bin_scores(scores, labels)) == pytest.approx(slow, abs=1e-6)
    sure = bin_scores(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1, 0, 1, 1]).bool())
    assert calibration_error(sure) == pytest.approx(0.25)
