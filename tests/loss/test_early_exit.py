"""The weights and the loss J, against tables worked by hand and the plain double loop."""

import pytest
import torch

from loss.cross_entropy import IGNORE_INDEX
from loss.early_exit import e, e_tilde, early_exit_loss


def test_e_equals_the_table_worked_by_hand():
    # L = 5, e_scale = 0.2: 0.2 * (0, 1, 3, 6), and 4 + 0.2 * (0 + 1 + 2 + 3).
    assert [e(l, 5, 0.2) for l in range(5)] == pytest.approx([0, 0.2, 0.6, 1.2, 5.2])
    assert [e(l, 4, 1.0) for l in range(4)] == pytest.approx([0, 1, 3, 6])
    assert [e(l, 4, 0.0) for l in range(4)] == [0, 0, 0, 3]


def test_e_tilde_equals_the_table_worked_by_hand():
    assert e_tilde((1, 4), 5, 0.2) == pytest.approx({1: 0.2 / 5.4, 4: 5.2 / 5.4})
    assert e_tilde((0, 1, 2, 3), 4, 1.0) == pytest.approx({0: 0, 1: 0.1, 2: 0.3, 3: 0.6})


@pytest.mark.parametrize("L", [1, 2, 7, 24])
@pytest.mark.parametrize("e_scale", [0.0, 0.1, 1.0])
def test_weights_sum_to_one_when_the_last_layer_is_on(L, e_scale):
    for active in ((L - 1,), tuple(range(L))):
        assert sum(e_tilde(active, L, e_scale).values()) == pytest.approx(1.0)


def test_nothing_to_train_weighs_nothing():
    assert e_tilde((0,), 4, 0.5) == {0: 0.0}


def plain_double_loop(hidden, head, labels, weights, num_tokens):
    """Write J as the paper does: over exits, over tokens."""
    total = 0.0
    for l, h in hidden.items():
        for b in range(labels.shape[0]):
            for s in range(labels.shape[1]):
                if labels[b, s] != IGNORE_INDEX:
                    log_probs = (head @ h[b, s]).log_softmax(-1)
                    total = total - weights[l] * log_probs[labels[b, s]] / num_tokens
    return total


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 100])
def test_J_equals_the_plain_double_loop_in_value_and_gradient(chunk_rows):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(11, (2, 7), generator=g)
    labels[0, 3] = labels[1, 0] = IGNORE_INDEX
    weights = {1: 0.1, 2: 0.3, 4: 0.6}
    outcomes = []
    for form in ("chunked", "plain"):
        g.manual_seed(1)
        head = torch.randn(11, 6, generator=g).requires_grad_()
        hidden = {l: torch.randn(2, 7, 6, generator=g).requires_grad_() for l in weights}
        if form == "chunked":
            J = early_exit_loss(
                hidden, head, labels, weights, num_tokens=12, chunk_rows=chunk_rows
            ).total
        else:
            J = plain_double_loop(hidden, head, labels, weights, 12)
        (3.0 * J).backward()
        outcomes.append((J.detach(), head.grad, *(h.grad for h in hidden.values())))
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_exit_losses_come_back_unweighted_and_unreduced():
    hidden = {l: torch.zeros(1, 3, 2) for l in (0, 1)}
    loss = early_exit_loss(
        hidden, torch.zeros(4, 2), torch.tensor([[1, 2, IGNORE_INDEX]]), {0: 0.0, 1: 1.0},
        num_tokens=2, chunk_rows=8,
    )  # fmt: skip
    uniform = torch.log(torch.tensor(4.0))
    for sums in loss.per_exit.values():
        torch.testing.assert_close(sums, 2 * uniform)
    torch.testing.assert_close(loss.total, uniform)


def test_evaluation_without_gradients_gives_the_same_loss():
    g = torch.Generator().manual_seed(0)
    head, h = torch.randn(9, 5, generator=g, requires_grad=True), torch.randn(3, 4, 5, generator=g)
    labels = torch.randint(9, (3, 4), generator=g)
    arguments = ({0: h}, head, labels, {0: 1.0})
    with torch.no_grad():
        evaluated = early_exit_loss(*arguments, num_tokens=1, chunk_rows=5)
    trained = early_exit_loss(*arguments, num_tokens=1, chunk_rows=5)
    assert not evaluated.total.requires_grad
    assert trained.total.requires_grad
    assert torch.equal(evaluated.total, trained.total)
