"""A Llama under Hugging Face's names: weights pass by renaming alone, see `models/llama.py`."""

import re
from typing import Any

from torch import Tensor

from models.config import LlamaConfig

_NAMES = {
    r"^tok_embeddings\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^layers\.": "model.layers.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.attention\.w([qkvo])\.": r".self_attn.\1_proj.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
}


def hugging_face_name(name: str) -> str:
    """Return what `LlamaForCausalLM` calls the parameter `name` of ours."""
    for ours, theirs in _NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


def hugging_face_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ours under the names of `LlamaForCausalLM`; tensors are shared."""
    return {hugging_face_name(name): tensor for name, tensor in state.items()}


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    """Return the arguments of transformers' `LlamaConfig`, as `config.json` holds them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    return {
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
    }
