"""Matrix products of a few tokens on a CPU, at the cost of one.

torch passes a float32 product of 2 to 16 rows to MKL, which on many processors takes 2 to 5 times
as long as one row: to verify a draft would cost several steps. oneDNN, with the weight in its own
layout, reads it once for all rows. Both compute in full float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.loading.quantized import is_quantized
from models.llama import Llama

PACKED_ELEMENTS = 2**17
"""Weights with fewer elements stay as they are: oneDNN's call costs more than it saves."""
PACKED_ONLY_ELEMENTS = 2**20
"""From so many elements on, one row is no faster unpacked, and only the packed weight is kept."""


class PackedLinear(nn.Module):
    """y = x W^T + b with W also, or only, in oneDNN's layout.

    Args:
        weight: (out, in), float32 or bfloat16, on a CPU.
        bias: b, (out,); None: 0.
        keep: Keep `weight` itself in any case.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, keep: bool = False) -> None:
        super().__init__()
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.width = len(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 4)
        small = weight.numel() < PACKED_ONLY_ELEMENTS
        self.plain_for_one = small and weight.dtype == torch.float32
        self.weight = weight if keep or self.plain_for_one else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., out), for x: (..., in)."""
        if self.plain_for_one and x.numel() == x.shape[-1]:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return _product(x, self.packed, self.bias, self.width)
        return _packed_product(x, self.packed, self.bias)


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@torch.library.custom_op("skipstone::packed_linear", mutates_args=())
def _product(x: Tensor, packed: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """Wrap the product as one call: torch 2.13's compiler takes no weight in oneDNN's layout."""
    return _packed_product(x, packed, bias)


@_product.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def can_pack(model: Llama) -> bool:
    """Return whether this machine has packed products for the model's device and dtype."""
    weight = model.norm.weight
    dtypes = (torch.float32, torch.bfloat16)
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return weight.device.type == "cpu" and weight.dtype in dtypes and onednn


def pack(model: Llama) -> None:
    """Pack the large matrices of a model for inference, in place.

    The head keeps its plain weight too, which `Llama.head_weight` returns; large matrices of the
    layers, and of exits of their own, are freed.
    """
    for part in (*model.layers.modules(), *model.own_exits.modules()):
        for name, linear in list(part.named_children()):
            if not isinstance(linear, nn.Linear) or is_quantized(linear):
                continue
            if linear.weight.numel() >= PACKED_ELEMENTS:
                setattr(part, name, PackedLinear(linear.weight, linear.bias))
    if model.head_weight.numel() >= PACKED_ELEMENTS:
        model.lm_head = PackedLinear(model.head_weight, keep=True)
