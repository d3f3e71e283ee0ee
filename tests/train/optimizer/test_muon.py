"""Muon on any number of ranks is torch's on one, and what torch's own is meant to be."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import LlamaConfig
from models.llama import Llama
from tests.distributed import like, run_distributed, whole
from train.monitoring.replica_check import ReplicaCheck, ReplicaCheckConfig
from train.optimizer.muon import Muon, newton_schulz
from train.optimizer.optim import OptimConfig, build_optimizer, set_lr, update_unless
from train.parallel.parallelize import ParallelConfig, build_model

# Over four ranks, rows split as 3 3 3 1 (w1, w3), 3 3 3 3 (wq, wo, w2) and 2 2 2 0 (wk, wv).
MODEL = LlamaConfig(
    dim=12, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=10, vocab_size=20, max_seq_len=8
)
CONFIG = OptimConfig(name="muon", lr=0.02, weight_decay=0.3, muon_momentum=0.9)
STEPS = 3
SHAPES = [(12, 12), (6, 12), (10, 12), (12, 10), (1, 5), (7, 1)]


def gradient(t, shape):
    generator = torch.Generator().manual_seed(1000 * t + sum(shape) + 7 * shape[0])
    return torch.randn(shape, generator=generator)


def rate(t):
    """Return a learning rate of step t's own."""
    return 0.02 / (t + 1)


def slow(weights, gradients, *, momentum=0.9, decay=0.3):
    """Take Muon's steps on one matrix as arXiv 2502.16982 writes them, in float64."""
    W, M = weights.double().numpy(), 0.0
    for t, grad in enumerate(gradients):
        G = grad.double().numpy()
        M = momentum * M + (1 - momentum) * G
        X = momentum * M + (1 - momentum) * G
        X = X / np.linalg.norm(X)
        for _ in range(5):
            XXT = X @ X.T
            X = 3.4445 * X + (-4.7750 * XXT + 2.0315 * XXT @ XXT) @ X
        W = W - rate(t) * (0.2 * np.sqrt(max(W.shape)) * X + decay * W)
    return torch.from_numpy(W).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_one_process_is_torchs_muon_bit_for_bit_and_near_the_slow_form(shape):
    start = gradient(99, shape)
    ours, torchs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"weight_decay": 0.3, "momentum": 0.9}
    muon = Muon([{"params": [ours], **options}])
    theirs = torch.optim.Muon([torchs], adjust_lr_fn="match_rms_adamw", **options)
    for t in range(STEPS):
        for optimizer, parameter in ((muon, ours), (theirs, torchs)):
            optimizer.param_groups[0]["lr"] = rate(t)
            parameter.grad = gradient(t, shape)
            optimizer.step()
    assert torch.equal(ours, torchs)
    expected = slow(start, [gradient(t, shape) for t in range(STEPS)])
    # bfloat16 has 8 bits, of updates that add up to 0.02 (1 + 1/2 + 1/3) 0.2 sqrt(12) at most.
    torch.testing.assert_close(ours.detach(), expected, atol=1.5e-3, rtol=0)
    assert (ours - start).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)])
def test_an_update_is_nearly_orthogonal_and_of_the_size_it_is_scaled_for(shape):
    found = newton_schulz(gradient(0, shape), (3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    values = torch.linalg.svdvals(found)
    assert values[: len(values) * 3 // 4].min() > 0.6
    assert values.max() < 1.3
    # An orthogonal matrix has RMS 1 / sqrt(max(A, B)).
    assert found.square().mean().sqrt() * max(shape) ** 0.5 == pytest.approx(0.95, abs=0.15)


class Watch(TorchDispatchMode):
    """Counts collectives, and fails where the host reads a value of the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the local tensors
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(keywords or {}))


def give_gradients(model, t, scale=1.0):
    for p in model.parameters():
        p.grad = like(p, gradient(t, p.shape) * scale)


def state_of(model, optimizer):
    """Return a copy of this rank's part of all weights and moments there are."""
    tensors = dict(model.named_parameters())
    for inner in optimizer:
        for i, state in enumerate(inner.state.values()):
            tensors |= {f"{type(inner).__name__} {i} {key}": value for key, value in state.items()}
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


def train(runtime, parallel):
    """Take STEPS steps, each after one that is skipped; return what the last sent as well."""
    model = build_model(MODEL, parallel, runtime, seed=0)
    optimizer = build_optimizer(model, CONFIG)
    for t in range(STEPS):
        set_lr(optimizer, rate(t))
        before = state_of(model, optimizer)
        give_gradients(model, t, float("nan"))
        update_unless(torch.tensor(True), optimizer, 0)
        after = state_of(model, optimizer)
        assert len(after) == 21 + 14 + 3 * 7  # weights; of Muon; of AdamW on embeddings and norms
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        give_gradients(model, t)
        with Watch() as watch:
            update_unless(torch.tensor(False), optimizer, 0)
    return model, optimizer, watch.counts


def torchs_own():
    """Return the weights after torch's own optimizers, unsharded and without bad steps."""
    model = Llama(MODEL)
    model.init_weights(0)
    named = dict(model.named_parameters())
    blocks = [p for name, p in named.items() if name.startswith("layers") and p.ndim == 2]
    embeddings = [named["tok_embeddings.weight"], named["lm_head.weight"]]
    adamw = {"betas": (0.9, 0.95), "fused": True}
    muon = {"momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [
        torch.optim.Muon(blocks, weight_decay=0.3, **muon),
        torch.optim.AdamW(embeddings, weight_decay=0.3, **adamw),
        torch.optim.AdamW([p for p in named.values() if p.ndim == 1], weight_decay=0, **adamw),
    ]
    for t in range(STEPS):
        for p in model.parameters():
            p.grad = gradient(t, p.shape)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate(t)
            optimizer.step()
    return {name: p.detach() for name, p in named.items()}


def check_layouts(runtime, cases):
    """Compare each layout, given with the collectives of a step, with torch's own."""
    for parallel, collectives in cases:
        model, optimizer, counts = train(runtime, parallel)
        # Of the last two matrices in four, the second copy of a model has none.
        assert runtime.gather(counts)[0] == collectives
        for name, expected in torchs_own().items():
            found = whole(dict(model.named_parameters())[name]).detach().cpu()
            # The last elements of a part may round otherwise than in the whole, and the iteration
            # makes 480 times as much of what is small; orthogonal parts would be 0.01 away.
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0, msg=name)
        if runtime.world_size > 1:
            ReplicaCheck(ReplicaCheckConfig(), model, optimizer, runtime).check(STEPS)


# A model has 14 matrices, which n ranks take n at a time.
def test_on_one_rank_it_is_torchs():
    run_distributed(check_layouts, 1, [(ParallelConfig(shard="blocks"), {})])


def test_sharded_and_copied_over_two_ranks_it_is_torchs():
    exchanged = {"alltoall_base_": 14}
    cases = [
        (ParallelConfig(shard="blocks"), exchanged),
        (ParallelConfig(shard="blocks", cpu_offload=True), exchanged),
        (ParallelConfig(shard="blocks", dp_replicate=2), {"allreduce_": 7}),
        (ParallelConfig(shard="none"), {"allreduce_": 7}),
    ]
    run_distributed(check_layouts, 2, cases)


def test_sharded_and_hybrid_over_four_ranks_it_is_torchs():
    cases = [
        (ParallelConfig(shard="blocks"), {"alltoall_base_": 8}),
        (ParallelConfig(shard="blocks", dp_replicate=2), {"alltoall_base_": 8, "allreduce_": 4}),
    ]
    run_distributed(check_layouts, 4, cases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_torchs():
    run_distributed(check_layouts, 1, [(ParallelConfig(shard="blocks"), {})])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_and_copied_over_two_gpus_it_is_torchs():
    cases = [
        (ParallelConfig(shard="blocks"), {"alltoall_base_": 14}),
        (ParallelConfig(shard="blocks", dp_replicate=2), {"allreduce_": 7}),
    ]
    run_distributed(check_layouts, 2, cases)
