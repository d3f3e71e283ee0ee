"""p(l, t), the draws, and the running of kept rows, against tables worked by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.kept_rows import on_rows
from models.layer_dropout import (
    D,
    LayerChoice,
    LayerDropoutConfig,
    S,
    draw_kept_rows,
    p,
    run_kept_rows,
    uniform,
)
from models.layer_masks import LayerMasks
from tests.models.test_llama import build, small

CPU = torch.device("cpu")


def test_D_equals_the_table_worked_by_hand():
    # L = 4: 2^0 - 1, 2^(1/3) - 1, 2^(2/3) - 1, 2^1 - 1.
    assert [D(l, 4) for l in range(4)] == pytest.approx([0, 0.25992105, 0.58740105, 1], abs=1e-8)
    assert [D(l, 5, "linear") for l in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [D(l, 3, "uniform") for l in range(3)] == [1, 1, 1]
    # Figure 12 of the paper pairs p_max 0.2 with a constant rate 0.0889 over 32 layers.
    assert 0.2 * sum(D(l, 32) for l in range(32)) / 32 == pytest.approx(0.0889, abs=5e-5)


def test_S_equals_the_table_worked_by_hand():
    assert [S(t, 3) for t in range(3)] == pytest.approx([0, 0.41421356, 1], abs=1e-8)
    assert [S(t, 3, "constant") for t in range(3)] == [1, 1, 1]
    assert [S(t, 5, "linear_increasing") for t in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [S(t, 5, "linear_decreasing") for t in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_p_is_the_product_of_its_factors():
    config = LayerDropoutConfig(p_max=0.2)
    assert p(3, 2, L=4, T=3, config=config) == pytest.approx(0.2)
    assert p(1, 1, L=4, T=3, config=config) == pytest.approx(0.2 * 0.25992105 * 0.41421356)


def test_models_of_one_layer_and_runs_of_one_step_are_defined():
    assert D(0, 1) == D(0, 1, "linear") == 0
    assert D(0, 1, "uniform") == D(0, 1, "linear_from_first") == 1
    assert S(0, 1) == 0


def test_draws_are_uniform_and_independent_of_company():
    u = uniform(7, 3, 6, np.arange(4000))
    assert u.shape == (6, 4000)
    assert 0 <= u.min() < u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.01)
    histogram = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((histogram - 1200) ** 2 / 1200).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
    assert np.abs(np.corrcoef(u) - np.eye(6)).max() < 0.06
    alone = uniform(7, 3, 6, np.array([1234]))
    assert np.array_equal(alone[:, 0], u[:, 1234])
    for seed, t in ((8, 3), (7, 4)):
        assert abs(np.corrcoef(u[0], uniform(seed, t, 6, np.arange(4000))[0])[0, 1]) < 0.06


def rows_of(p_l, n=4, seed=0, **changes):
    arguments = dict(seed=seed, t=0, keys=np.arange(n), scale_kept=False, device=CPU)
    return draw_kept_rows(p_l, **(arguments | changes))


def counts_of(kept):
    """Return how many rows each layer runs on; None means all of them."""
    return [None if choice.rows is None else len(choice.rows) for choice in kept.choices]


def test_rows_are_dropped_at_the_asked_rate():
    kept = rows_of([0.0, 0.3, 0.8, 1.0], n=5000)
    assert kept.at(0).rows is None
    assert len(kept.at(1).rows) / 5000 == pytest.approx(0.7, abs=0.02)
    assert len(kept.at(2).rows) / 5000 == pytest.approx(0.2, abs=0.02)
    assert len(kept.at(3).rows) == 0


def test_rows_with_one_key_are_dropped_together():
    keys = np.zeros(6, dtype=np.int64)
    sizes = {-1 if rows_of([0.5], seed=s, keys=keys).at(0).rows is None else 0 for s in range(20)}
    assert sizes == {-1, 0}
    for s in range(20):
        rows = rows_of([0.5], seed=s, keys=keys).at(0).rows
        assert rows is None or len(rows) == 0


def test_no_dropout_is_no_plan():
    assert rows_of([0.0, 0.0]) is None


def masked_reference(model, tokens, kept, L):
    """Run every layer on every row and select with a mask: the slow, plain form."""
    h = model.embed(tokens)
    for l in range(L):
        out, _ = model.run_layers(h, l, l + 1)
        keep = torch.ones(len(tokens), dtype=torch.bool)
        choice = kept.at(l)
        if choice.rows is not None:
            keep[:] = False
            keep[choice.rows] = True
        out = h + choice.scale * (out - h)
        h = torch.where(keep[:, None, None], out, h)
    return h


@pytest.mark.parametrize("scale_kept", [False, True])
def test_kept_rows_equal_masking_in_value_and_gradient(scale_kept):
    model = build(small(n_layers=4))
    tokens = torch.randint(61, (5, 7), generator=torch.Generator().manual_seed(0))
    kept = rows_of([0.0, 0.4, 0.6, 1.0], n=5, seed=3, scale_kept=scale_kept)
    counts = counts_of(kept)
    assert counts[0] is None
    assert counts[3] == 0
    assert 0 < counts[1] < 5
    outcomes = []
    for run in (
        lambda: model.run_layers(model.embed(tokens), 0, 4, masks=LayerMasks(kept_rows=kept))[0],
        lambda: masked_reference(model, tokens, kept, 4),
    ):
        model.zero_grad()
        h = run()
        h.square().sum().backward()
        outcomes.append(
            (
                h.detach(),
                {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None},
            )
        )
    (fast, fast_grads), (slow, slow_grads) = outcomes
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    for name, grad in slow_grads.items():  # fp32 sums of another order; gradients reach 100
        torch.testing.assert_close(fast_grads[name], grad, atol=1e-4, rtol=1e-3, msg=name)
    assert fast_grads["layers.3.attention.wq.weight"].abs().max() == 0  # zero, and not None


class OfWholeBatches(TorchDispatchMode):
    """Counts the operations whose result is as large as the batch."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.counts = elements, Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.elements and not function.is_view:
            self.counts[str(function.overloadpacket).removeprefix("aten.")] += 1
        return out


@pytest.mark.parametrize("rows", [[4, 0, 1], [2], []])
def test_a_layer_passes_over_the_whole_batch_once_forward_and_once_backward(rows):
    h = torch.randn(5, 3, 4, requires_grad=True)
    grad = torch.randn(5, 3, 4)
    expected = {"index_copy": 1} if rows else {}
    with OfWholeBatches(60) as forward:
        out = run_kept_rows(
            lambda x, *_: x * x, h, h[:1], h[:1], LayerChoice(torch.tensor(rows).long(), 1.0)
        )
    with OfWholeBatches(60) as backward:
        (grad_h,) = torch.autograd.grad(out, h, grad)
    assert forward.counts == expected
    assert backward.counts == expected
    kept = torch.zeros(5, 1, 1, dtype=torch.bool)
    kept[rows] = True
    assert torch.equal(out, torch.where(kept, h * h, h))
    assert torch.equal(grad_h, torch.where(kept, 2 * h * grad, grad))


def test_gradients_of_rows_are_those_of_differences():
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(2, 6, 3, generator=generator, dtype=torch.double, requires_grad=True)
    rows = torch.tensor([3, 0, 5])

    def layers(h, weight):
        for l in range(3):
            h = on_rows(lambda kept: kept + (weight[:1] * kept).tanh(), h, rows[l:])
        return h

    assert torch.autograd.gradcheck(layers, (h, weight))
    assert torch.autograd.gradcheck(lambda weight: layers(h.detach(), weight), weight)


def test_probability_one_is_the_identity_block():
    model = build(small(n_layers=2))
    h = model.embed(torch.arange(6).view(2, 3))
    masks = LayerMasks(kept_rows=rows_of([1.0, 1.0], n=2))
    out, _ = model.run_layers(h, 1, 2, masks=masks)
    assert torch.equal(out, h)


def test_dropped_rows_cost_no_compute_and_every_block_is_called():
    model = build(small(n_layers=4))
    seen = []
    for block in model.layers.values():
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    kept = rows_of([0.0, 0.5, 0.5, 1.0], n=8, seed=1)
    h = model.embed(torch.zeros(8, 5, dtype=torch.long))
    model.run_layers(h, 0, 4, masks=LayerMasks(kept_rows=kept))
    expected = [40 if n is None else max(5 * n, 1) for n in counts_of(kept)]
    assert seen == expected
    assert expected[3] == 1


def test_progressive_layer_dropping_equals_its_equations():
    """theta(t) = (1 - theta_bar) e^(-gamma t) + theta_bar, keep 1 - (i / L) (1 - theta(t))."""
    config = LayerDropoutConfig(p_max=0.5, D="linear_from_first", S="progressive", scale_kept=True)
    L, T, theta_bar, gamma = 12, 1000, 0.5, 0.1
    for t in (0, 7, 500):
        theta = (1 - theta_bar) * math.exp(-gamma * t) + theta_bar
        for l in range(L):
            keep = 1 - (l + 1) / L * (1 - theta)
            assert p(l, t, L=L, T=T, config=config) == pytest.approx(1 - keep)
    kept = draw_kept_rows((0.5,), seed=0, t=0, keys=np.arange(9), scale_kept=True, device=CPU)
    assert kept.at(0).scale == 2.0  # 1 / keep of the same layer
