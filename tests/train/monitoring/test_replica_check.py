"""A single flipped bit is seen, and its rank named."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from models.config import LlamaConfig
from tests.distributed import run_distributed
from train.monitoring.replica_check import (
    CHUNK,
    ReplicaCheck,
    ReplicaCheckConfig,
    ReplicasDifferError,
    differences,
)
from train.optimizer.optim import OptimConfig, build_optimizer
from train.parallel.parallelize import ParallelConfig, build_model

MODEL = LlamaConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=53, max_seq_len=8
)
WEIGHT = "layers.1.feed_forward.w2.weight"


def trained(runtime, dp_replicate):
    """Return a model and optimizer after two steps on gradients that all ranks agree on."""
    model = build_model(
        MODEL, ParallelConfig(shard="blocks", dp_replicate=dp_replicate), runtime, seed=0
    )
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    for t in range(2):
        for p in model.parameters():
            p.grad = p.detach() * (t + 1) + 1e-3
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def flip(tensor, index=3, bit=0):
    """Flip one bit, by default the lowest of the mantissa, of this rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local.detach().view(-1).view(torch.int32)[index] ^= 1 << bit


def tensors_by_name(model, optimizer):
    parameter = dict(model.named_parameters())[WEIGHT]
    state = next(inner.state[parameter] for inner in optimizer)
    return {
        WEIGHT: parameter,
        f"exp_avg of {WEIGHT}": state["exp_avg"],
        f"exp_avg_sq of {WEIGHT}": state["exp_avg_sq"],
        "buffer rope_cos": model.rope_cos,
    }


def error_of(check, done_steps):
    with pytest.raises(ReplicasDifferError) as caught:
        check.check(done_steps)
    return str(caught.value)


def check_hybrid(runtime):
    model, optimizer = trained(runtime, dp_replicate=2)
    check = ReplicaCheck(ReplicaCheckConfig(), model, optimizer, runtime)
    check.check(7)
    for name, tensor in tensors_by_name(model, optimizer).items():
        if runtime.rank == 2:
            flip(tensor)
        message = error_of(check, 8)
        # The replicas of rank 2's shard are ranks 0 and 2; of a buffer, all four ranks.
        assert f"step 8 rank {'2' if 'buffer' in name else '0 or 2'} of 4" in message, message
        assert f"in {name}, drain" in message
        assert "every checkpoint after step 7" in message
        assert set(runtime.gather(message)) == {message}
        if runtime.rank == 2:
            flip(tensor)
        check.check(7)
    inner = next(iter(optimizer))
    if runtime.rank == 3:
        next(iter(inner.state.values()))["step"] += 1
    assert "rank 3 of 4 holds other bits than its replicas in Adam's step counts" in error_of(
        check, 9
    )


def check_copies(runtime):
    """Four ranks with whole copies: the majority is right."""
    model, optimizer = trained(runtime, dp_replicate=4)
    check = ReplicaCheck(ReplicaCheckConfig(), model, optimizer, runtime)
    for bit in (0, 22, 31):
        if runtime.rank == 1:
            flip(tensors_by_name(model, optimizer)[WEIGHT], bit=bit)
        message = error_of(check, 8)
        assert f"rank 1 of 4 holds other bits than its replicas in {WEIGHT}, drain" in message
        assert "every checkpoint this job wrote" in message
        if runtime.rank == 1:
            flip(tensors_by_name(model, optimizer)[WEIGHT], bit=bit)
        check_swap = tensors_by_name(model, optimizer)[f"exp_avg of {WEIGHT}"].to_local().view(-1)
        if runtime.rank == 3:
            check_swap[[2, 5]] = check_swap[[5, 2]]
        assert f"rank 3 of 4 holds other bits than its replicas in exp_avg of {WEIGHT}" in error_of(
            check, 8
        )
        if runtime.rank == 3:
            check_swap[[2, 5]] = check_swap[[5, 2]]
    assert "rank 2 of 4 holds other bits than its replicas in the count of steps" in error_of(
        check, 8 if runtime.rank == 2 else 9
    )


def check_replicas(runtime):
    check_hybrid(runtime)
    check_copies(runtime)


def test_a_flipped_bit_names_the_minority_or_the_two_that_differ():
    run_distributed(check_replicas, 4)


def check_sharded(runtime):
    model, optimizer = trained(runtime, dp_replicate=1)
    check = ReplicaCheck(ReplicaCheckConfig(interval_steps=3), model, optimizer, runtime)
    assert [check.due(done) for done in range(1, 7)] == [False, False, True] * 2
    check.check(3)
    if runtime.rank == 1:
        # No other rank holds this shard to compare it with.
        flip(tensors_by_name(model, optimizer)[WEIGHT])
    check.check(6)
    if runtime.rank == 1:
        flip(model.rope_sin, index=17)
    message = error_of(check, 9)
    assert "rank 0 or 1 of 2 holds other bits than its replicas in buffer rope_sin" in message


def test_plain_shards_compare_their_buffers():
    run_distributed(check_sharded, 2)


def check_alone(runtime):
    model, optimizer = trained(runtime, dp_replicate=1)
    check = ReplicaCheck(ReplicaCheckConfig(interval_steps=1), model, optimizer, runtime)
    assert not check.due(1)
    # The hash itself, over more than one chunk.
    tensor = torch.randn(2 * CHUNK + 5, generator=torch.Generator().manual_seed(0))
    first = int(check._hash(tensor))
    for index in (0, CHUNK, 2 * CHUNK + 4):
        flip(tensor, index)
        assert int(check._hash(tensor)) != first
        flip(tensor, index)
        assert int(check._hash(tensor)) == first
    for i, j in ((0, 1), (5, CHUNK + 5)):
        tensor[[i, j]] = tensor[[j, i]]
        assert int(check._hash(tensor)) != first
        tensor[[i, j]] = tensor[[j, i]]
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        check._hash(torch.ones(3, dtype=dtype))


def test_one_rank_compares_with_none_and_the_hash_depends_on_bits_and_positions():
    run_distributed(check_alone, 1)


def test_the_minority_is_named_once_for_all_its_tensors():
    keys = [7, 7]
    by_rank = [[keys, [1, 5]], [keys, [1, 5]], [keys, [2, 6]]]
    assert differences(["a", "b"], by_rank) == {(2,): ["a", "b"]}
    assert differences(["a", "b"], by_rank[:2]) == {}
    assert differences(["a", "b"], by_rank[1:]) == {(0, 1): ["a", "b"]}


def test_problems_name_the_field():
    assert ReplicaCheckConfig(interval_steps=0).problems() == []
    assert "replica_check.interval_steps" in ReplicaCheckConfig(interval_steps=-1).problems()[0]
