"""Every weight and setting counts in the hash, and how a model is held does not."""

import copy

import pytest
import torch

from models.fingerprint import weights_fingerprint
from tests.models.test_llama import build, small


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"router": "mlp"},
        {"own_exits": (1, 2), "own_exit_mlp": True},
        {"dim": 256, "ffn_dim": 512, "vocab_size": 512},  # more elements than are hashed
    ],
    ids=str,
)
def test_each_parameter_counts(changes):
    model = build(small(**changes)).requires_grad_(False)
    found = {weights_fingerprint(model)}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        other = copy.deepcopy(model)
        weight = other.get_parameter(name)
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        found.add(weights_fingerprint(other))
    assert len(found) == 1 + len(names)


@pytest.mark.parametrize("row", [0, 37, 100, 252])
def test_a_few_rows_of_a_matrix_count_wherever_they_are(row):
    model = build(small(dim=256)).requires_grad_(False)
    before = weights_fingerprint(model)
    model.block(1).attention.wq.weight[row : row + 5] += 1  # 64 of 65536 elements: each 1040th
    assert weights_fingerprint(model) != before


def test_fingerprints_tell_checkpoints_and_configurations_apart_and_not_dtypes():
    model = build(small())
    assert weights_fingerprint(build(small())) == weights_fingerprint(model)
    assert weights_fingerprint(build(small()).bfloat16()) == weights_fingerprint(model)
    others = [build(small(), seed=1), build(small(rope_theta=5e5)), build(small(router="linear"))]
    others += [build(small(own_exits=(E,))) for E in (1, 2)]
    assert len({weights_fingerprint(each) for each in (model, *others)}) == 6
