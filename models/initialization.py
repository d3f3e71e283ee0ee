"""Initial values of a model's parameters: a pure function of seed and name."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from models.config import LlamaConfig


def initial_value(name: str, parameter: Tensor, config: LlamaConfig, seed: int) -> Tensor:
    """Return the initial value of a whole parameter, fp32, on its device.

    Norm weights and the routers' biases are 1, other biases and the routers' last weights 0. Every
    other matrix is N(0, std) cut at 3 std, drawn in fp32:
      tok_embeddings, lm_head, wq, wk, wv, w1, w3   std = dim^-0.5
      wo                                            std = dim^-0.5 / sqrt(2 L)
      w2                                            std = ffn_dim^-0.5 / sqrt(2 L)
    (sqrt(2 L) keeps the residual stream's variance from growing with depth: GPT-2, section 2.3.)
    Each parameter has its own generator, seeded by (seed, its name), so the values do not depend on
    how the model is sharded.

    Args:
        name: Name of the parameter.
        parameter: Of which shape and device are read, not values.
        config: The model.
        seed: Any non-negative integer.
    """
    full = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    routers = name.startswith("routers.")
    if parameter.ndim == 1:
        return full.fill_(0.0 if name.endswith("bias") and not routers else 1.0)
    if routers and name.endswith("out.weight"):
        return full.zero_()
    std = config.ffn_dim**-0.5 if name.endswith("w2.weight") else config.dim**-0.5
    if name.endswith(("w2.weight", "wo.weight")):
        std *= (2 * config.n_layers) ** -0.5
    entropy = np.random.SeedSequence([seed, zlib.crc32(name.encode())])
    generator = torch.Generator(device=parameter.device)
    generator.manual_seed(int(entropy.generate_state(1)[0]))
    nn.init.trunc_normal_(full, std=std, a=-3 * std, b=3 * std, generator=generator)
    return full
