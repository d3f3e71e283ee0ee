"""Rotary position embeddings, in the half-split layout of Hugging Face checkpoints."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling: stretches the slow rotations beyond the trained context."""

    factor: float = 8.0
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_seq_len / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_seq_len / high_freq_factor are left alone."""
    original_max_seq_len: int = 8192
    """Context length, in tokens, before scaling."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = [
            f"model.rope_scaling.{name}: {getattr(self, name)}, must be {least} to {most}"
            for name, least, most in (
                ("factor", 1, 1e6),
                ("low_freq_factor", 1e-6, 1e6),
                ("high_freq_factor", 1e-6, 1e6),
                ("original_max_seq_len", 1, 2**22),
            )
            if not least <= getattr(self, name) <= most  # so is NaN
        ]
        if not found and self.high_freq_factor <= self.low_freq_factor:
            found.append(
                f"model.rope_scaling.high_freq_factor: {self.high_freq_factor}, must be more than "
                f"low_freq_factor {self.low_freq_factor}"
            )
        return found


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the rotary frequencies, (head_dim / 2,) fp32, in radians per position.

    RoFormer (arXiv 2104.09864): theta_i = theta^(-2i / head_dim). With `scaling`, the Llama 3
    rule: slow frequencies are divided by `factor`, fast ones kept, those between blended.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies: Tensor = 1.0 / theta ** (exponent / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x: (batch, heads, seq, head_dim) by cos and sin: (batch or 1, 1, seq, head_dim).

    Both halves of cos are the same, and of sin.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _rotate(x, cos, sin)
    out: Tensor = _Rotation.apply(x, cos, sin)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (x_1 cos - x_2 sin, x_2 cos + x_1 sin) of the halves x_1 and x_2 of x."""
    out = x * cos
    (x_1, x_2), (out_1, out_2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    half = sin[..., : x_1.shape[-1]]
    out_1.addcmul_(x_2, half, value=-1)
    out_2.addcmul_(x_1, half)
    return out


class _Rotation(torch.autograd.Function):
    """The rotation, whose gradient is rotated back: autograd would fill and add its slices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
