"""Maps come back from their file."""

import pytest
import torch

from inference.fitting.jump_fitting import fit_jump
from inference.strategies.jump_maps import load_jump, save_jump
from tests.inference.every_strategy import make_model
from tests.models.test_llama import build, small


def test_maps_come_back_from_their_file_for_their_checkpoint_alone(tmp_path):
    model = make_model()
    windows = torch.randint(0, 50, (40, 16), generator=torch.Generator().manual_seed(0))
    jump = fit_jump(model, windows, rank=2, ridge=1e-4)
    save_jump(tmp_path / "j", jump, model, {"rank": "2"})
    h = torch.randn(3, 32)
    assert torch.equal(load_jump(tmp_path / "j", model)(3, h), jump(3, h))
    other = build(small(n_layers=6, n_kv_heads=2), seed=9)
    with pytest.raises(ValueError, match="fitted to another checkpoint"):
        load_jump(tmp_path / "j", other)
