"""A Llama under Hugging Face's names: weights pass by renaming alone, see `models/llama.py`."""

import re
from typing import Any

from torch import Tensor

from data.foreign_json import shown, take
from models.config import LlamaConfig
from models.rope import RopeScaling

ARCHITECTURE = "LlamaForCausalLM"
SHAPE_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings", "hidden_act"),
    *("attention_bias", "mlp_bias"),
)
"""Fields of a config.json that decide a Llama's logits."""

_FIELDS = dict[str, Any] | None

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
    """Return the name in `LlamaForCausalLM` of our parameter `name`."""
    for ours, theirs in _NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


def hugging_face_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ours under the names of `LlamaForCausalLM`; tensors are shared."""
    return {hugging_face_name(name): tensor for name, tensor in state.items()}


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    """Return the arguments of transformers' `LlamaConfig`, as `config.json` holds them.

    Raises:
        ValueError: If the model has parts that a Hugging Face Llama has not.
    """
    if config.router != "none":
        raise ValueError(
            f"router: a Hugging Face Llama cannot hold {config.router} routers, convert to "
            "skipstone or give a model without them"
        )
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


def config_json(
    config: LlamaConfig, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """Return the content of `config.json`, for transformers 4 and 5 and compatible readers.

    Args:
        config: The shape of the model.
        dtype: Of the weights, as torch names it.
        bos_id: Token id, or None where there is no tokenizer.
        eos_id: Likewise.
    """
    fields = hugging_face_config(config)
    rope = fields["rope_parameters"]
    scaled = rope["rope_type"] != "default"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **fields,
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def llama_config(fields: dict[str, Any]) -> LlamaConfig:
    """Return the shape a `config.json` describes.

    Raises:
        ValueError: Naming each field that no Llama of ours can have.
    """
    if fields.get("model_type") != "llama":
        raise ValueError(f"model_type {shown(fields.get('model_type'))} is not llama")
    rope = take({"rope_scaling": None} | fields, "rope_scaling", _FIELDS)  # first in transformers
    rope = rope or take({"rope_parameters": None} | fields, "rope_parameters", _FIELDS) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    n_heads = take(fields, "num_attention_heads", int)

    def given(name: str, hint: Any, default: Any, among: dict[str, Any] = fields) -> Any:
        return take({name: default} | among, name, hint)

    config = LlamaConfig(
        dim=take(fields, "hidden_size", int),
        n_layers=take(fields, "num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=given("num_key_value_heads", int | None, None) or n_heads,
        ffn_dim=take(fields, "intermediate_size", int),
        vocab_size=take(fields, "vocab_size", int),
        max_seq_len=given("max_position_embeddings", int, 2048),
        norm_eps=given("rms_norm_eps", float, 1e-6),
        rope_theta=float(
            given("rope_theta", float, given("rope_theta", float | None, None) or 1e4, rope)
        ),
        rope_scaling=_rope_scaling(rope) if kind == "llama3" else None,
        tie_embeddings=given("tie_word_embeddings", bool, False),
    )
    problems = config.problems()
    head_dim = None if problems else given("head_dim", int | None, None) or config.head_dim
    found = {
        f"rope_type is {shown(kind)}, not default or llama3": kind not in ("default", "llama3"),
        f"head_dim is {head_dim}, not hidden_size / num_attention_heads": not problems
        and head_dim != config.head_dim,
        "its rotation is partial": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "it is quantized": bool(fields.get("quantization_config")),
        "its attention has biases": bool(fields.get("attention_bias", False)),
        "its feed-forward layers have biases": bool(fields.get("mlp_bias", False)),
        f"hidden_act is {shown(fields.get('hidden_act'))}, not silu": fields.get(
            "hidden_act", "silu"
        )
        != "silu",
    }
    problems += [problem for problem, holds in found.items() if holds]
    if problems:
        raise ValueError(", ".join(problems))
    return config


def _rope_scaling(fields: dict[str, Any]) -> RopeScaling:
    return RopeScaling(
        factor=take(fields, "factor", float),
        low_freq_factor=take(fields, "low_freq_factor", float),
        high_freq_factor=take(fields, "high_freq_factor", float),
        original_max_seq_len=take(fields, "original_max_position_embeddings", int),
    )
