"""Matrix products of a few tokens on a CPU, at the cost of one.

torch passes a float32 product of 2 to 16 rows to MKL, which on many processors takes 2 to 5 times
as long as one row: to verify a draft would cost several steps. Of a large matrix, oneDNN with the
weight in its own layout reads it once for all rows; of a small one, whose calls take the time, a
transposed weight is fastest for any rows. All compute in full float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.llama import Llama

PACKED_ELEMENTS = 2**17
"""Weights with fewer elements are not packed: oneDNN's call costs more than it saves."""
TRANSPOSED_ELEMENTS = 2**19
"""Float32 weights with fewer elements are transposed instead."""
KEPT_ELEMENTS = 2**28
"""Of float32 models of up to so many parameters, the plain weights are kept beside the packed ones:
one row is up to a fifth faster with them."""


class TransposedLinear(nn.Module):
    """y = x W^T + b with W^T contiguous.

    Args:
        weight: (out, in).
        bias: b, (out,); None: 0.
    """

    transposed: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.transposed = weight.detach().t().contiguous()
        self.bias = None if bias is None else bias.detach()

    @property
    def weight(self) -> Tensor:
        """(out, in), a view."""
        return self.transposed.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., out), for x: (..., in)."""
        out = torch.matmul(x, self.transposed)
        return out if self.bias is None else out + self.bias


def add_product(h: Tensor, linear: nn.Module, x: Tensor) -> Tensor:
    """Return h + linear(x), of h: (n, out) and x: (n, in)."""
    if isinstance(linear, TransposedLinear) and linear.bias is None:
        return torch.addmm(h, x, linear.transposed)
    return h + linear(x)


class PackedLinear(nn.Module):
    """y = x W^T + b with W also, or only, in oneDNN's layout.

    Args:
        weight: (out, in), float32 or bfloat16, on a CPU.
        bias: b, (out,); None: 0.
        keep: Keep `weight` as well, for products of one row in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, keep: bool = False) -> None:
        super().__init__()
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.width = len(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 4)
        self.weight = weight if keep else None
        self.plain_for_one = keep and weight.dtype == torch.float32

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


def linear_layers(model: Llama) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return the linear layers of all layers and exits' own parts: in which module, by what name.

    The head is none of them.
    """
    return [
        (module, name, linear)
        for module in (*model.layers.modules(), *model.own_exits.modules())
        for name, linear in module.named_children()
        if isinstance(linear, nn.Linear)
    ]


def pack(model: Llama) -> None:
    """Lay out the matrices of a model for inference, in place.

    The head keeps its plain weight too, which `Llama.head_weight` returns.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) <= KEPT_ELEMENTS
    keep = small and model.norm.weight.dtype == torch.float32
    for part, name, linear in linear_layers(model):
        if type(linear.weight.data) is torch.Tensor:
            setattr(part, name, _laid_out(linear.weight, linear.bias, linear, keep=keep))
    weight = model.head_weight
    model.lm_head = _laid_out(weight, None, model.lm_head, keep=True)


def _laid_out(
    weight: Tensor, bias: Tensor | None, plain: nn.Module | None, *, keep: bool
) -> nn.Module | None:
    """Return the fastest form of a matrix; `plain` where that is the matrix itself."""
    if weight.dtype == torch.float32 and weight.numel() < TRANSPOSED_ELEMENTS:
        return TransposedLinear(weight, bias)
    if weight.numel() >= PACKED_ELEMENTS:
        return PackedLinear(weight, bias, keep=keep)
    return plain
