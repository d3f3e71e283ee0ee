"""Our Llama is transformers' Llama, is causal, and does not depend on how it was built."""

from dataclasses import replace

import pytest
import torch

from models.config import LlamaConfig
from models.llama import Llama
from models.rope import RopeScaling


def small(**changes) -> LlamaConfig:
    fields = dict(
        dim=32, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=61, max_seq_len=96
    )
    return LlamaConfig(**(fields | changes))


def build(config: LlamaConfig, seed: int = 0) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


def hugging_face_twin(model: Llama) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_seq_len,
        }
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            vocab_size=c.vocab_size,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=c.tie_embeddings,
        )
    ).eval()
    names = {
        "tok_embeddings": "model.embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.w": "self_attn.",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        for letter in "qkvo":
            name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
        if name.startswith(("layers.", "norm.")):
            name = "model." + name
        state[name] = value
    if c.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("rope_theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "rope_scaling",
    [None, RopeScaling(factor=8.0, original_max_seq_len=32)],
    ids=["plain", "llama3"],
)
def test_logits_equal_transformers(n_kv_heads, tie_embeddings, rope_theta, rope_scaling):
    model = build(
        small(
            n_kv_heads=n_kv_heads,
            tie_embeddings=tie_embeddings,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
        )
    )
    tokens = torch.randint(61, (2, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h, _ = model.run_layers(model.embed(tokens), 0, 3)
        ours = model.exit_logits(h)
        theirs = hugging_face_twin(model)(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("E", [1, 2, 3])
def test_every_exit_equals_transformers_with_fewer_layers(E):
    model = build(small())
    twin = hugging_face_twin(model)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(2))
    twin.model.layers = twin.model.layers[:E]
    with torch.no_grad():
        hidden = model(tokens, exit_layers={E - 1}).exits[E - 1]
        ours = torch.nn.functional.linear(hidden, model.head_weight)
        theirs = twin(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_no_position_depends_on_a_later_token():
    model = build(small())
    h = model.embed(torch.arange(10)[None]).detach().requires_grad_()
    out, _ = model.run_layers(h, 0, 3)
    (grad,) = torch.autograd.grad(out[0, 4].sum(), h)
    assert grad[0, :5].abs().sum(-1).min() > 0
    assert torch.equal(grad[0, 5:], torch.zeros(5, 32))


def test_running_the_layers_in_two_parts_is_running_them_at_once():
    model = build(small())
    h = model.embed(torch.arange(10)[None])
    whole, exits = model.run_layers(h, 0, 3, exit_layers={1})
    half, _ = model.run_layers(h, 0, 2)
    assert torch.equal(half, exits[1])
    assert torch.equal(model.run_layers(half, 2, 3)[0], whole)


def test_initial_weights_depend_on_seed_and_name_alone():
    one, two, other = build(small(), 5), build(small(n_layers=4), 5), build(small(), 6)
    w = "layers.1.attention.wq.weight"
    assert torch.equal(one.state_dict()[w], two.state_dict()[w])
    assert not torch.equal(one.state_dict()[w], other.state_dict()[w])
    assert not torch.equal(one.state_dict()[w], one.state_dict()["layers.2.attention.wq.weight"])


def test_initial_weights_have_the_documented_spread():
    other = {"attention_bias": "qkvo", "ffn_bias": True, "qk_norm": "head"}
    model = build(small(dim=256, ffn_dim=512, n_layers=2, vocab_size=500, **other))
    state = model.state_dict()
    cut = 0.98658  # the standard deviation of a unit normal cut at 3
    for name, std in {
        "tok_embeddings.weight": 256**-0.5,
        "lm_head.weight": 256**-0.5,
        "layers.0.attention.wq.weight": 256**-0.5,
        "layers.1.attention.wo.weight": 256**-0.5 / 2,
        "layers.1.feed_forward.w2.weight": 512**-0.5 / 2,
    }.items():
        assert state[name].std().item() == pytest.approx(std * cut, rel=0.02)
    for name, value in state.items():
        if value.ndim == 1:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("norm.weight"))))


def test_problems_name_field_value_and_remedy():
    assert small().problems() == []
    [problem] = small(n_heads=5, n_kv_heads=5).problems()
    assert "model.n_heads: 5 does not divide model.dim 32" in problem
    assert "n_kv_heads" in small(n_kv_heads=3).problems()[0]
    assert "max_seq_len" in small(max_seq_len=1).problems()[0]
    for fields, line in (
        ({"head_dim": 7}, "model.head_dim: 7, must be even"),
        (
            {"head_dim": 4096, "n_heads": 64, "n_kv_heads": 64},
            "64 heads together at most 131072 wide",
        ),
        ({"sliding_window": 0}, "model.sliding_window: 0, must be 1 to 4194304"),
    ):
        [problem] = small(**fields).problems()
        assert line in problem
    assert small(dim=34, head_dim=8).problems() == [], "heads need not divide the width then"


def test_a_head_width_follows_the_heads_unless_it_is_given():
    assert replace(small(), n_heads=2).head_width == 16
    assert replace(small(head_dim=12), n_heads=2).head_width == 12
    assert small(head_dim=8).has_weights_of(small(max_seq_len=48))
    assert not small(head_dim=12).has_weights_of(small())
