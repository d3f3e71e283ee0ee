"""The density penalty is a plain double loop over rows, however the batch is split."""

import pytest
import torch

from loss.density import DensityConfig, density_penalty_sum, running_share_sum


def make_gates(rows=5):
    g = torch.Generator().manual_seed(0)
    return {l: torch.rand(rows, 7, generator=g, requires_grad=True) for l in range(3)}


def slow_penalty(gates, weight, target):
    total = 0.0
    for row in range(5):
        density = sum(gates[l][row, i] for l in range(3) for i in range(7)) / 21
        total = total + weight * (density - target) ** 2
    return total


def test_value_and_gradient_equal_the_slow_form():
    config, gates = DensityConfig(weight=0.7, target=0.3), make_gates()
    found = []
    for penalty in (density_penalty_sum(gates, config), slow_penalty(gates, 0.7, 0.3)):
        found.append((penalty.detach(), torch.autograd.grad(penalty, list(gates.values()))))
    torch.testing.assert_close(found[0], found[1])


def test_parts_of_a_batch_add_up_to_the_whole():
    config, gates = DensityConfig(weight=2.0, target=0.4), make_gates()
    parts = [{l: p[rows] for l, p in gates.items()} for rows in (slice(0, 2), slice(2, 5))]
    whole = density_penalty_sum(gates, config)
    torch.testing.assert_close(sum(density_penalty_sum(part, config) for part in parts), whole)
    torch.testing.assert_close(
        sum(running_share_sum(part) for part in parts), running_share_sum(gates)
    )


def test_the_running_share_counts_what_is_above_a_half():
    gates = {0: torch.tensor([[0.5, 0.6], [0.9, 0.8]]), 1: torch.tensor([[0.1, 0.7], [0.2, 1.0]])}
    assert running_share_sum(gates).item() == pytest.approx(2 / 4 + 3 / 4)


def test_at_the_target_there_is_nothing_to_pay():
    gates = {l: torch.full((2, 4), 0.25) for l in range(3)}
    assert density_penalty_sum(gates, DensityConfig(weight=5.0, target=0.25)) == 0


def test_problems_name_field_value_and_remedy():
    assert DensityConfig().problems() == []
    found = DensityConfig(weight=-1.0, target=1.5).problems()
    assert found == [
        "density.weight: -1.0, must not be negative",
        "density.target: 1.5, must lie in [0, 1]",
    ]
