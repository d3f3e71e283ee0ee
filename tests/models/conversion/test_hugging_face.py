"""Under their names our weights make transformers' model give our logits."""

import pytest
import torch

from models.conversion.hugging_face import hugging_face_config, hugging_face_state
from models.rope import RopeScaling
from tests.models.test_llama import build, small

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=8.0, original_max_seq_len=32)])
def test_logits_are_equal(tied, scaling):
    model = build(small(n_kv_heads=2, tie_embeddings=tied, rope_scaling=scaling, rope_theta=5e5))
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**hugging_face_config(model.config))
    ).eval()
    missing, unexpected = twin.load_state_dict(hugging_face_state(model.state_dict()), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])
    twin.tie_weights()
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h, _ = model.run_layers(model.embed(tokens), 0, 3)
        torch.testing.assert_close(model.exit_logits(h), twin(tokens).logits, atol=1e-5, rtol=0)
