"""A model under Hugging Face's names: weights pass by renaming alone, see `models/llama.py`."""

import re
from typing import Any

from torch import Tensor

from data.foreign_json import shown, take
from models.config import LlamaConfig
from models.conversion.families import FAMILIES, Family, family_of
from models.rope import RopeScaling

_SHAPE_FIELDS = (
    "model_type",
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings", "hidden_act"),
)

_FIELDS = dict[str, Any] | None

_NAMES = {
    r"^tok_embeddings\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^layers\.": "model.layers.",
    r"\.attention\.w([qkvo])\.": r".self_attn.\1_proj.",
    r"\.attention\.([qk])_norm\.": r".self_attn.\1_norm.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
}
_NORM_NAMES = {
    "pre": {
        r"\.attention_norm\.": ".input_layernorm.",
        r"\.ffn_norm\.": ".post_attention_layernorm.",
    },
    "post": {
        r"\.attention_norm\.": ".post_attention_layernorm.",
        r"\.ffn_norm\.": ".post_feedforward_layernorm.",
    },
}


def hugging_face_name(name: str, config: LlamaConfig) -> str:
    """Return the name in Hugging Face's model of our parameter `name`."""
    for ours, theirs in (_NAMES | _NORM_NAMES[config.norm_position]).items():
        name = re.sub(ours, theirs, name)
    return name


def hugging_face_state(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Return a state dict of ours under the names of Hugging Face's; tensors are shared."""
    return {hugging_face_name(name, config): tensor for name, tensor in state.items()}


def shape_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json that decide the logits.

    Others, such as pad_token_id or num_labels, may hold what no other program can read.
    """
    decide = (*_SHAPE_FIELDS, *_read_family(fields).own_fields)
    return {name: value for name, value in fields.items() if name in decide}


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    """Return the arguments of transformers' `AutoConfig.for_model`, as `config.json` holds them.

    Raises:
        ValueError: If the model has parts that no model of Hugging Face has.
    """
    family = family_of(config)
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
        "model_type": family.model_type,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        **_own_fields(config, family),
    }


def _own_fields(config: LlamaConfig, family: Family) -> dict[str, Any]:
    values = {
        "attention_bias": config.attention_bias != "none",
        "mlp_bias": config.ffn_bias,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": config.n_layers if config.sliding_window is None else 0,
    }
    return {name: values[name] for name in family.own_fields if name in values}


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
        "architectures": [family_of(config).architecture],
        **fields,
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "hidden_act": "silu",
        **family_of(config).constants,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _read_family(fields: dict[str, Any]) -> Family:
    given = fields.get("model_type")
    for family in FAMILIES:
        if family.model_type == given:
            return family
    names = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"model_type {shown(given)} is none of {names}")


def llama_config(fields: dict[str, Any]) -> LlamaConfig:
    """Return the shape a `config.json` describes.

    Raises:
        ValueError: Naming each field that no model of ours can have.
    """
    family = _read_family(fields)
    rope = take({"rope_scaling": None} | fields, "rope_scaling", _FIELDS)  # first in transformers
    rope = rope or take({"rope_parameters": None} | fields, "rope_parameters", _FIELDS) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))

    def given(name: str, hint: Any, default: Any, among: dict[str, Any] = fields) -> Any:
        return take({name: default} | among, name, hint)

    def known(name: str, hint: Any) -> Any:
        return given(name, hint, family.default(name))

    n_layers, n_heads = (
        take(fields, name, int) for name in ("num_hidden_layers", "num_attention_heads")
    )
    dim, head_dim = take(fields, "hidden_size", int), known("head_dim", int | None)
    has_bias = "attention_bias" in family.own_fields and given("attention_bias", bool | None, False)
    config = LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=known("num_key_value_heads", int | None) or n_heads,
        ffn_dim=take(fields, "intermediate_size", int),
        vocab_size=take(fields, "vocab_size", int),
        max_seq_len=known("max_position_embeddings", int),
        norm_eps=known("rms_norm_eps", float),
        rope_theta=float(
            given("rope_theta", float, given("rope_theta", float | None, None) or 1e4, rope)
        ),
        rope_scaling=_rope_scaling(rope) if kind == "llama3" else None,
        tie_embeddings=given("tie_word_embeddings", bool, False),
        head_dim=None if head_dim is None or head_dim * n_heads == dim else head_dim,
        sliding_window=_sliding_window(fields, family, n_layers),
        attention_bias="qkvo" if has_bias else family.attention_bias[0],
        ffn_bias="mlp_bias" in family.own_fields and bool(given("mlp_bias", bool | None, False)),
        qk_norm=family.qk_norm,
        norm_position=family.norm_position,
    )
    if problems := [*config.problems(), *_unlike_ours(fields, rope, kind)]:
        raise ValueError(", ".join(problems))
    return config


def _unlike_ours(fields: dict[str, Any], rope: dict[str, Any], kind: object) -> list[str]:
    """Return what no model of ours can have, whatever its family."""
    activation = fields.get("hidden_act", "silu")
    found = {
        f"rope_type is {shown(kind)}, not default or llama3": kind not in ("default", "llama3"),
        "its rotation is partial": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "it is quantized": bool(fields.get("quantization_config")),
        f"hidden_act is {shown(activation)}, not silu": activation != "silu",
    }
    return [problem for problem, holds in found.items() if holds]


def _sliding_window(fields: dict[str, Any], family: Family, n_layers: int) -> int | None:
    """Return the sliding window of all layers, in tokens; None: they have none.

    Raises:
        ValueError: Some layers have one and others not.
    """
    if family.windows == "none":
        return None
    defaults = {
        "sliding_window": family.default("sliding_window"),
        "use_sliding_window": False,
        "max_window_layers": 28,
        "layer_types": None,
    }
    fields = defaults | fields
    window: int | None = take(fields, "sliding_window", int | None)
    if family.windows == "all":
        return window
    if not take(fields, "use_sliding_window", bool):
        window = None
    types = take(fields, "layer_types", list[str] | None)
    full = min(max(take(fields, "max_window_layers", int), 0), n_layers)
    with_window = n_layers - full if window is not None else 0
    if types is not None:
        with_window = types.count("sliding_attention")
        if len(types) != n_layers or len(types) != with_window + types.count("full_attention"):
            raise ValueError(
                f"layer_types: {shown(types)}, give full_attention or sliding_attention for each "
                "layer"
            )
    if 0 < with_window < n_layers:
        raise ValueError(
            f"sliding_window: {with_window} of {n_layers} layers have one, here all have or none"
        )
    if with_window and window is None:
        raise ValueError("layer_types: sliding_attention, but there is no sliding_window")
    return window if with_window else None


def _rope_scaling(fields: dict[str, Any]) -> RopeScaling:
    return RopeScaling(
        factor=take(fields, "factor", float),
        low_freq_factor=take(fields, "low_freq_factor", float),
        high_freq_factor=take(fields, "high_freq_factor", float),
        original_max_seq_len=take(fields, "original_max_position_embeddings", int),
    )
