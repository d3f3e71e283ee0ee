"""Under their names our weights make transformers' model give our logits, in every family."""

import pytest
import torch

from models.conversion.families import FAMILIES, family_of
from models.conversion.hugging_face import (
    config_json,
    hugging_face_config,
    hugging_face_state,
    llama_config,
)
from models.rope import RopeScaling
from tests.models.families import ALL, SHAPES, build_random, shape

transformers = pytest.importorskip("transformers")

CONFIGS = {name: shape(**changes) for name, changes in SHAPES.items()} | {
    "llama, tied": shape(tie_embeddings=True, rope_theta=5e5),
    "llama 3": shape(rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=32)),
    "mistral, odd width": shape(dim=34, head_dim=8),
    "qwen2, window": shape(attention_bias="qkv", sliding_window=6),
    "qwen3, biases": shape(qk_norm="head", attention_bias="qkvo"),
    "olmo2, biases": shape(qk_norm="full", norm_position="post", attention_bias="qkvo"),
}


def twin_of(model):
    """Return transformers' model of the same weights."""
    config = transformers.AutoConfig.for_model(**hugging_face_config(model.config))
    twin = transformers.AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = twin.load_state_dict(
        hugging_face_state(model.state_dict(), model.config), strict=False
    )
    assert unexpected == []
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    twin.tie_weights()
    return twin


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_exits_logits_are_equal(name):
    model = build_random(CONFIGS[name])
    twin = twin_of(model)
    assert twin.config.model_type == name.partition(",")[0].removesuffix(" 3")
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    _, exits = model.run_layers(model.embed(tokens), 0, 3, exit_layers=range(3))
    for l, h in exits.items():
        twin.config.num_hidden_layers = l + 1  # as its assistant_early_exit does
        theirs = twin(tokens, use_cache=False).logits
        torch.testing.assert_close(model.exit_logits(h, l + 1), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json_is_read_as_it_was_written(name):
    config = CONFIGS[name]
    written = config_json(config, dtype="float32", bos_id=1, eos_id=2)
    assert llama_config(written) == config
    read = transformers.AutoConfig.for_model(**written)
    assert written["architectures"] == [family_of(config).architecture]
    assert llama_config(read.to_dict()) == config, "with transformers' own fields besides"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_fields_that_are_missing_are_what_transformers_takes(family):
    least = {"model_type": family.model_type, "hidden_size": 256, "num_attention_heads": 32}
    least |= {"intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61}
    theirs = transformers.AutoConfig.for_model(**least).to_dict()
    assert llama_config(least) == llama_config(theirs)


def test_a_shape_of_no_family_is_one_line_that_names_the_field():
    for changes, message in (
        (ALL, "model.ffn_bias: True, no model of Hugging Face has this shape"),
        ({"norm_position": "post"}, r"norm_position: post, .* \(Llama, the nearest, has pre\)"),
        ({"attention_bias": "qkvo", "sliding_window": 8}, "model.sliding_window: 8, .*has None"),
        ({"dim": 34, "head_dim": 8, "ffn_bias": True}, "model.head_dim: 8, .* has only where"),
    ):
        with pytest.raises(ValueError, match=message):
            hugging_face_config(shape(**changes))
