"""The chunked cross entropy equals torch's, and holds one chunk of logits at a time."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loss.cross_entropy import ExitTokens, weighted_cross_entropy_sums
from loss.softmax import IGNORE_INDEX


class LargestLive(TorchDispatchMode):
    """Count the bytes of storage shaped like one chunk of logits, (4, vocab), alive at once."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.live, self.peak = vocab_size, {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape == (4, self.vocab_size):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return out


def inputs(K, seed=0, vocab=37, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(4, 8, 6, generator=g).to(dtype).requires_grad_() for _ in range(K)]
    head = torch.randn(vocab, 6, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (4, 8), generator=g)
    labels[1, :5] = IGNORE_INDEX
    return hidden, head, labels


def sums_of(hidden, head, labels, weights, **options):
    exits = [ExitTokens(h, labels, w) for h, w in zip(hidden, weights, strict=True)]
    return weighted_cross_entropy_sums(exits, head, **options)


def test_sums_and_gradients_equal_torch_in_double():
    hidden, head, labels = inputs(3)
    weights = [0.2, 0.0, 0.8]
    total, sums = sums_of(hidden, head, labels, weights, chunk_rows=7)
    grads = torch.autograd.grad(total, [*hidden, head])
    expected = [
        F.cross_entropy(
            (h.double() @ head.double().T).flatten(0, 1), labels.flatten(),
            ignore_index=IGNORE_INDEX, reduction="sum",
        )
        for h in hidden
    ]  # fmt: skip
    reference = sum(w * c for w, c in zip(weights, expected, strict=True))
    torch.testing.assert_close(sums, torch.stack(expected).float(), atol=1e-4, rtol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(reference, [*hidden, head]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def slow_objective(hidden, head, labels, z_loss, by_confidence):
    """Sum CE + z_loss log^2 Z over the tokens, from whole logits in float64."""
    logits = hidden.double() @ head.double().T
    losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1) ** 2
    if by_confidence:
        losses = losses * logits.softmax(-1).amax(-1).detach()
    return losses[labels != IGNORE_INDEX].sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("chunk_rows", [7, 100])
def test_z_loss_and_confidence_equal_the_slow_form_in_double(z_loss, chunk_rows):
    hidden, head, labels = inputs(3)
    part = hidden[1][1:, ::2]  # an exit may have fewer tokens than another
    exits = [
        ExitTokens(hidden[0], labels, 0.2, True),
        ExitTokens(part, labels[1:, ::2], 0.3, True),
        ExitTokens(hidden[2], labels, 0.5),
    ]
    total, sums = weighted_cross_entropy_sums(exits, head, chunk_rows=chunk_rows, z_loss=z_loss)
    slow = sum(
        e.weight * slow_objective(e.hidden, head, e.labels, z_loss, e.by_confidence) for e in exits
    )
    torch.testing.assert_close(total, slow.float())
    plain = [slow_objective(e.hidden, head, e.labels, 0.0, False).float() for e in exits]
    torch.testing.assert_close(sums, torch.stack(plain))
    grads = torch.autograd.grad(total, [*hidden, head], retain_graph=True)
    for ours, theirs in zip(grads, torch.autograd.grad(slow, [*hidden, head]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        evaluated, _ = weighted_cross_entropy_sums(
            exits, head, chunk_rows=chunk_rows, z_loss=z_loss
        )
    assert torch.equal(evaluated, total)


@pytest.mark.parametrize("K", [1, 6])
@pytest.mark.parametrize("options", [(0.0, False), (0.01, True)])
def test_live_logits_do_not_grow_with_the_number_of_exits(K, options):
    hidden, head, labels = inputs(K, vocab=1001)
    z_loss, by_confidence = options
    with LargestLive(1001) as counter:
        exits = [ExitTokens(h, labels, 1.0, by_confidence) for h in hidden]
        total, _ = weighted_cross_entropy_sums(exits, head, chunk_rows=4, z_loss=z_loss)
        total.backward()
    assert counter.peak == 4 * 1001 * 4


def test_all_positions_ignored_gives_zero_and_not_nan():
    hidden, head, labels = inputs(1)
    labels.fill_(IGNORE_INDEX)
    total, _ = sums_of(hidden, head, labels, [1.0] * 1, chunk_rows=9)
    total.backward()
    assert total == 0
    assert head.grad.abs().max() == 0


def test_a_frozen_head_gets_no_gradient():
    hidden, head, labels = inputs(2)
    head.requires_grad_(False)
    total, _ = sums_of(hidden, head, labels, [1.0] * 2, chunk_rows=9)
    total.backward()
    assert head.grad is None
    assert hidden[0].grad.abs().max() > 0


def test_low_precision_gradients_are_close():
    hidden, head, labels = inputs(2, dtype=torch.bfloat16)
    total, _ = sums_of(hidden, head, labels, [1.0] * 2, chunk_rows=9)
    total.backward()
    assert head.grad.dtype == torch.bfloat16
    (exact,) = torch.autograd.grad(
        sum(
            F.cross_entropy((h.float() @ head.float().T).flatten(0, 1), labels.flatten(),
                            reduction="sum", ignore_index=IGNORE_INDEX)
            for h in hidden
        ),
        head,
    )  # fmt: skip
    torch.testing.assert_close(head.grad.float(), exact.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("chunk_rows", [4, 512])
def test_chunks_in_low_precision_are_not_rounded_one_by_one(chunk_rows):
    # Two exits on the same tokens in another order, with opposite weights: the head's gradient is
    # 0. Of chunks that were rounded to bf16 a hundredth would be left.
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 8, generator=g).bfloat16()
    head = torch.randn(64, 8, generator=g).bfloat16().requires_grad_()
    labels, order = torch.randint(64, (512,), generator=g), torch.randperm(512, generator=g)
    exits = [ExitTokens(hidden, labels, 1.0), ExitTokens(hidden[order], labels[order], -1.0)]
    total, _ = weighted_cross_entropy_sums(exits, head, chunk_rows=chunk_rows)
    (grad,) = torch.autograd.grad(total, head)
    assert grad.abs().max() < 2e-5
    (exact,) = torch.autograd.grad(
        F.cross_entropy(hidden.double() @ head.double().t(), labels, reduction="sum"), head
    )
    total, _ = weighted_cross_entropy_sums(exits[:1], head, chunk_rows=chunk_rows)
    (grad,) = torch.autograd.grad(total, head)
    assert (grad - exact).norm() < 0.004 * exact.norm()  # one rounding of bf16 is 2^-8 at most
