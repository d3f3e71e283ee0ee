"""Tiny shapes of the model families, and such models with no weight left at 0 or 1."""

import torch

from tests.models.test_llama import build, small

SHAPES = {
    "mistral": {"head_dim": 12, "sliding_window": 5},
    "qwen2": {"attention_bias": "qkv", "tie_embeddings": True},
    "qwen3": {"head_dim": 12, "qk_norm": "head", "sliding_window": 9, "norm_eps": 1e-6},
    "olmo2": {"qk_norm": "full", "norm_position": "post"},
    "llama": {"head_dim": 16, "attention_bias": "qkvo", "ffn_bias": True},
}
"""{model_type of Hugging Face: changes of `small`}; 4 heads, 2 of them for keys and values."""

ALL = {
    **{"head_dim": 12, "sliding_window": 5, "attention_bias": "qkvo", "ffn_bias": True},
    **{"qk_norm": "head", "norm_position": "post"},
}
"""All that differs from a Llama at once, which is of no family."""


def shape(**changes):
    return small(**({"n_kv_heads": 2} | changes))


def build_random(config, seed=0):
    """Return a model whose norms and biases are random too."""
    model, draw = build(config, seed), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model
