"""Weights of the layers, and of exits of their own, in 8 or 4 bits, through torchao.

Embeddings, norms and the head stay plain. A quantized model is another model: lossless decoding
gives its tokens, not those of the model it was made from.
"""

import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from inference.engine.products import linear_layers
from models.llama import Llama

Bits = Literal["int8", "int4"]
BITS: tuple[Bits, ...] = get_args(Bits)

INT4_GROUP = 32
"""Input features that share a scale in int4."""
_READ_AT_ONCE = 16
"""Input features that torch's product in 8 bits reads at once; of fewer it reads beyond a row."""


class Int8Linear(nn.Module):
    """y = x W^T + b of bfloat16 x on a CPU, W as torchao rounded it; read in its 8 bits.

    torchao itself makes a bfloat16 matrix of W for every product, which takes longer than a product
    with plain weights.

    Args:
        linear: With a weight of torchao's int8, a scale for each output feature, and a multiple of
            16 input features.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight: Any = linear.weight
        self.bits, self.bias = weight.qdata.contiguous(), linear.bias
        self.scale = weight.scale.flatten().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., out), for x: (..., in)."""
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.bits, self.scale)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def quantize_layers(model: Llama, bits: Bits) -> None:
    """Quantize the matrices of a model for inference, in place.

    int8: a scale for each output feature. int4: one for each INT4_GROUP input features; a CPU has
    no kernel for it, and holds the 4-bit numbers in 8.

    Raises:
        ValueError: torchao is missing, or has no kernel for the model.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("quantize: torchao is not installed, pip install -e .[quantize]")
    from torchao.quantization import quantize_

    widths = {
        model.config.dim,
        model.config.ffn_dim,
        model.config.n_heads * model.config.head_width,
    }
    if bits == "int4" and any(width % INT4_GROUP for width in widths):
        raise ValueError(
            f"quantize: int4 needs widths that {INT4_GROUP} divides, this model has "
            f"{sorted(widths)}, give int8"
        )
    device = model.norm.weight.device
    if bits == "int4" and device.type == "cuda" and model.norm.weight.dtype != torch.bfloat16:
        raise ValueError("quantize: int4 on CUDA needs bfloat16, give --dtype bfloat16")
    for part in (model.layers, model.own_exits):
        quantize_(part, _torchao_config(bits, device.type))
    if bits == "int8" and device.type == "cpu" and model.norm.weight.dtype == torch.bfloat16:
        _read_in_bits(model)
    model.bits = bits  # type: ignore[assignment]


def bits_of(model: Llama) -> Bits | None:
    """Return the bits of the layers' matrices, None where they are plain."""
    return getattr(model, "bits", None)


def is_quantized(linear: nn.Linear) -> bool:
    """Return whether the weight of a linear layer is quantized."""
    return type(linear.weight.data) is not torch.Tensor


def _read_in_bits(model: Llama) -> None:
    for module, name, linear in linear_layers(model):
        if is_quantized(linear) and not linear.in_features % _READ_AT_ONCE:
            setattr(module, name, Int8Linear(linear))


def _torchao_config(bits: Bits, device_type: str) -> Any:
    from torchao import quantization

    if bits == "int8":
        return quantization.Int8WeightOnlyConfig()
    if device_type == "cuda":
        return quantization.Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d"
        )
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=quantization.PerGroup(INT4_GROUP),
    )
