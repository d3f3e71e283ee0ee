"""What was fitted to a checkpoint is read back for it alone."""

import pytest
import torch

from inference.loading.adapters import load_adapter, save_adapter
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


def test_what_does_not_belong_is_refused(model, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="there is no"):
        load_adapter(path, "gate", model)
    save_adapter(path, "gate", model, {"w": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="holds a gate, give a jump"):
        load_adapter(path, "jump", model)
    with pytest.raises(ValueError, match="fitted to another checkpoint"):
        load_adapter(path, "gate", build(small(), seed=1))
    trained_on = build(small()).requires_grad_(False)
    trained_on.block(1).attention.wq.weight.mul_(1.1)
    with pytest.raises(ValueError, match="fitted to another checkpoint"):
        load_adapter(path, "gate", trained_on)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(path, "gate", model)
