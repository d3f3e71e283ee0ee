"""The same weights in transformers, in ctranslate2, and in the official LayerSkip generator."""

import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from models.conversion.hugging_face import hugging_face_config, hugging_face_state
from models.llama import Llama

Decode = Callable[[list[int]], list[int]]
_DRAFTING = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)
NO_TOKEN = -1
"""An id that no text ends with."""


def transformers_twin(model: Llama) -> transformers.PreTrainedModel:
    """Return transformers' model of the same weights."""
    config = transformers.AutoConfig.for_model(**hugging_face_config(model.config))
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(config)
    state = hugging_face_state({n: t.clone() for n, t in model.state_dict().items()}, model.config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    twin.load_state_dict(state, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    return twin.eval()


def by_transformers(
    twin: transformers.PreTrainedModel,
    max_new_tokens: int,
    *,
    drafted: int | None = None,
    **options: object,
) -> Decode:
    """Return greedy decoding by `generate`.

    Args:
        twin: The model.
        max_new_tokens: Tokens to add.
        drafted: Tokens that an assistant drafts in each round; None: up to 20, while it is sure.
        **options: Further options of `generate`.
    """
    by_default = transformers.GenerationConfig()
    drafting = {name: getattr(by_default, name) for name in _DRAFTING}
    if drafted is not None:
        drafting = dict(zip(_DRAFTING, (drafted, "constant", 0.0), strict=True))

    def decode(prompt: list[int]) -> list[int]:
        # An assistant takes these from the model, and not from the call.
        vars(twin.generation_config).update(drafting)
        tokens = torch.tensor([prompt])
        out = twin.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=NO_TOKEN,
            pad_token_id=0,
            **options,
        )
        found: list[int] = out[0, len(prompt) :].tolist()
        return found

    return decode


def by_ctranslate2(twin: transformers.PreTrainedModel, max_new_tokens: int) -> Decode:
    """Return greedy decoding by ctranslate2, of weights converted by its own converter."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    vocabulary = {f"t{i}": i for i in range(twin.config.vocab_size)}

    class Converter(TransformersConverter):
        """Takes the model as it is, and ids for tokens."""

        def load_model(self, model_class: Any, path: str, **options: Any) -> Any:
            return deepcopy(twin)  # of which it deletes what it has converted

        def load_tokenizer(self, tokenizer_class: Any, path: str, **options: Any) -> Any:
            special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
            ids = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            return SimpleNamespace(
                **special, **ids, added_tokens_decoder={}, get_vocab=lambda: vocabulary
            )

    with tempfile.TemporaryDirectory() as folder:
        twin.config.save_pretrained(folder)
        converted = Path(folder) / "converted"
        Converter(folder).convert(str(converted))
        generator = ctranslate2.Generator(
            str(converted),
            compute_type="float32",
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )

    def decode(prompt: list[int]) -> list[int]:
        (result,) = generator.generate_batch(
            [[f"t{i}" for i in prompt]],
            max_length=max_new_tokens,
            min_length=max_new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        found: list[int] = result.sequences_ids[0]
        return found

    return decode


def by_layerskip(
    folder: Path, twin: transformers.PreTrainedModel, max_new_tokens: int, *, E: int, d: int
) -> dict[str, Decode]:
    """Return greedy decoding by the official code, plain and self-speculative.

    It was written for transformers 4.45, and runs here through the layers of this one.

    Args:
        folder: A clone of facebookresearch/LayerSkip.
        twin: The model.
        max_new_tokens: Tokens to add.
        E: Its exit_layer.
        d: Its num_speculations.
    """
    for name in ("colorama", "self_speculation.speculative_streamer"):
        sys.modules.setdefault(name, SimpleNamespace(SpeculativeTextStreamer=()))  # type: ignore
    sys.path.insert(0, str(folder))
    from self_speculation.autoregressive_generator import AutoRegressiveGenerationStrategy
    from self_speculation.generator_base import GenerationConfig
    from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy

    for name, method in {
        "from_legacy_cache": classmethod(_cache_of),
        "to_legacy_cache": _pairs_of,
        "__getitem__": lambda cache, l: _pairs_of(cache)[l],
    }.items():
        setattr(DynamicCache, name, method)
    model = _OldModel(twin)

    def decode(strategy: Any, **options: int) -> Decode:
        config = GenerationConfig(max_steps=max_new_tokens, sample=False, **options)

        def run(prompt: list[int]) -> list[int]:
            with torch.inference_mode():
                result = strategy.generate_token_ids(model, prompt, [NO_TOKEN], config)
            found: list[int] = result.predicted_tokens
            return found

        return run

    return {
        "LayerSkip's own code, autoregressive": decode(AutoRegressiveGenerationStrategy()),
        f"LayerSkip's own code, self_speculative:E={E}:d={d}": decode(
            SelfSpeculativeGenerationStrategy(), exit_layer=E, num_speculations=d
        ),
    }


class _OldModel:
    """What the official code reads of a model, with layers called as transformers 4.45 had it."""

    def __init__(self, twin: Any) -> None:
        layers = [_OldLayer(layer, twin.model.rotary_emb) for layer in twin.model.layers]
        self.model = SimpleNamespace(
            layers=layers, embed_tokens=twin.model.embed_tokens, norm=twin.model.norm
        )
        self.lm_head, self.device = twin.lm_head, twin.device


class _OldLayer:
    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        self._layer, self._rotary = layer, rotary

    def __call__(
        self,
        h: Tensor,
        *,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_value: DynamicCache,
        **unused: object,
    ) -> tuple[Tensor, DynamicCache]:
        out = self._layer(
            h,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_value,
            position_embeddings=self._rotary(h, position_ids),
        )
        return out, past_key_value


def _cache_of(cls: type, pairs: Any) -> DynamicCache:
    cache: DynamicCache = cls()
    for l, (k, v) in enumerate(pairs or ()):
        cache.update(k, v, l)
    return cache


def _pairs_of(cache: DynamicCache) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)
