"""What was fitted to a checkpoint is read back for it alone."""

import dataclasses
import hashlib
import json

import pytest
import torch

from inference.adapters import load_adapter, save_adapter, weights_fingerprint
from tests.models.test_llama import build, small


@pytest.fixture
def model():
    return build(small()).eval().requires_grad_(False)


def test_tensors_and_settings_come_back_in_the_models_dtype(model, tmp_path):
    w = torch.randn(3, 4)
    save_adapter(tmp_path / "a" / "x.safetensors", "gate", model, {"w": w}, {"form": "linear"})
    tensors, settings = load_adapter(tmp_path / "a" / "x.safetensors", "gate", model)
    assert torch.equal(tensors["w"], w)
    assert settings["form"] == "linear"
    half = build(small()).bfloat16()
    tensors, _ = load_adapter(tmp_path / "a" / "x.safetensors", "gate", half)
    assert tensors["w"].dtype == torch.bfloat16


def test_fingerprints_tell_weights_apart_and_not_dtypes(model):
    assert weights_fingerprint(build(small()).bfloat16()) == weights_fingerprint(model)
    assert weights_fingerprint(build(small(), seed=1)) != weights_fingerprint(model)


def test_fingerprints_know_exits_of_their_own_and_plain_models_have_the_one_they_had(model):
    plain = "1a96a8346c4f938b9375079a6573c6fe1a97bdba1bae3057e9ac6920ba3dee04"  # before there were
    assert weights_fingerprint(model) == plain
    own, other = build(small(own_exits=(1,))), build(small(own_exits=(2,)))
    assert len({weights_fingerprint(each) for each in (model, own, other)}) == 3
    before = weights_fingerprint(own)
    own.own_exits["1"].norm.weight.data.mul_(2)
    assert weights_fingerprint(own) != before


def test_what_does_not_belong_is_refused(model, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="there is no"):
        load_adapter(path, "gate", model)
    save_adapter(path, "gate", model, {"w": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="holds a gate, give a jump"):
        load_adapter(path, "jump", model)
    with pytest.raises(ValueError, match="fitted to another checkpoint"):
        load_adapter(path, "gate", build(small(), seed=1))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(path, "gate", model)


def test_models_without_routers_have_the_fingerprint_they_had_before_there_were_any(model):
    shape = dataclasses.asdict(model.config)
    assert shape.pop("router") == "none"
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    norms = [model.norm.weight, *(model.block(l).ffn_norm.weight for l in range(len(model.layers)))]
    for weight in (*norms, model.tok_embeddings.weight[:64]):
        digest.update(weight.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    assert weights_fingerprint(model) == digest.hexdigest()
    routed = build(small(router="linear"), seed=0)
    assert weights_fingerprint(routed) != weights_fingerprint(model)
