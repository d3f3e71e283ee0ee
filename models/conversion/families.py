"""The families of Hugging Face models that are a Llama but for fields of `LlamaConfig`.

The arithmetic of each, and what it takes where its config.json lacks a field, are transformers'.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.config import AttentionBias, LlamaConfig, NormPosition, QkNorm

Windows = Literal["none", "all", "by_layer"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: its names, and the values that fields of `LlamaConfig` have in it."""

    name: str
    model_type: str
    architecture: str
    """The class that reads it."""
    attention_bias: tuple[AttentionBias, ...] = ("none",)
    """With two values, a field of its config.json chooses."""
    ffn_bias: tuple[bool, ...] = (False,)
    """Likewise."""
    qk_norm: QkNorm = "none"
    norm_position: NormPosition = "pre"
    windows: Windows = "none"
    """Layers that may have a sliding window: none, all, or each by itself, of which ours have all
    or none."""
    defaults: Mapping[str, int | float | None] = field(default_factory=dict)
    """Of fields that its config.json lacks, where they are not a Llama's."""
    tokenizer_class: str = "AutoTokenizer"
    """What reads the tokenizer of an export, whichever that is."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Further fields to write."""

    def default(self, name: str) -> Any:
        """Return what a field of config.json is where it is missing."""
        return self.defaults.get(name, _DEFAULTS[name])

    @property
    def own_fields(self) -> tuple[str, ...]:
        """Fields of config.json that not every family has, and that decide its logits."""
        by_layer = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
        return (
            *(("attention_bias",) if len(self.attention_bias) > 1 else ()),
            *(("mlp_bias",) if len(self.ffn_bias) > 1 else ()),
            *{"none": (), "all": by_layer[:1], "by_layer": by_layer}[self.windows],
        )

    def misfits(self, config: LlamaConfig) -> Iterator[tuple[str, object]]:
        """Yield the fields that no model of this family has so, and what they are in it."""
        if config.attention_bias not in self.attention_bias:
            yield "attention_bias", " or ".join(self.attention_bias)
        if config.ffn_bias not in self.ffn_bias:
            yield "ffn_bias", self.ffn_bias[0]
        if config.qk_norm != self.qk_norm:
            yield "qk_norm", self.qk_norm
        if config.norm_position != self.norm_position:
            yield "norm_position", self.norm_position
        if config.sliding_window is not None and self.windows == "none":
            yield "sliding_window", None
        if self is LLAMA and config.dim % config.n_heads:  # transformers refuses it
            yield "head_dim", "only where n_heads divides dim"


_DEFAULTS: dict[str, int | float | None] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
_QWEN: dict[str, int | float | None] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}

LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    attention_bias=("none", "qkvo"),
    ffn_bias=(False, True),
)
MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    windows="all",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
)
QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    attention_bias=("qkv",),
    windows="by_layer",
    tokenizer_class="PreTrainedTokenizerFast",  # AutoTokenizer always takes Qwen2's own
    defaults=_QWEN,
)
QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    attention_bias=("none", "qkvo"),
    qk_norm="head",
    windows="by_layer",
    defaults=_QWEN | {"head_dim": 128},
)
OLMO2 = Family(
    name="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    attention_bias=("none", "qkvo"),
    qk_norm="full",
    norm_position="post",
    defaults={"rms_norm_eps": 1e-5},
    constants={"pad_token_id": None},  # else 1, often BOS, which transformers would mask
)
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2)
"""The first that fits is the one a model is written as: a Mistral without a window is a Llama."""


def family_of(config: LlamaConfig) -> Family:
    """Return the family that a model belongs to.

    Raises:
        ValueError: There is none; names the field that the nearest one has otherwise.
    """
    nearest = min(FAMILIES, key=lambda family: len(list(family.misfits(config))))
    for name, value in nearest.misfits(config):
        raise ValueError(
            f"model.{name}: {getattr(config, name)}, no model of Hugging Face has this shape "
            f"({nearest.name}, the nearest, has {value}), convert to skipstone"
        )
    return nearest
