"""The rotation and its gradient, beside the complex numbers of the paper."""

import torch

from models.rope import apply_rope


def test_pairs_turn_as_complex_numbers_and_gradients_turn_back():
    draw = torch.Generator().manual_seed(0)
    angles = torch.rand(1, 1, 5, 3, generator=draw, dtype=torch.float64) * 6
    cos, sin = (f(angles).repeat(1, 1, 1, 2) for f in (torch.cos, torch.sin))
    # As attention gives it: heads last in memory.
    x = torch.randn(2, 5, 4, 6, generator=draw, dtype=torch.float64).transpose(1, 2)
    x.requires_grad_(True)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    found = apply_rope(x, cos, sin)
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), dim=-1))
    with torch.no_grad():
        assert torch.equal(apply_rope(x, cos, sin), found)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), (x,))
