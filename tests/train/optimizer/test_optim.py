"""The learning rate against values worked by hand, and whose weights decay how much."""

from dataclasses import replace

import pytest

from models.config import LlamaConfig
from models.llama import Llama
from train.optimizer.optim import OptimConfig, build_optimizer, lr, num_moments
from train.parallel.blocks import checkpoint_blocks


def rates(schedule, T=11, **changes):
    fields = dict(lr=1.0, warmup_steps=2, schedule=schedule, min_lr_ratio=0.2)
    config = OptimConfig(**(fields | changes))
    return [lr(config, t, T) for t in range(T)]


def test_linear():
    expected = [0.5, 1.0] + [1 - 0.8 * k / 9 for k in range(1, 10)]
    assert rates("linear") == pytest.approx(expected)


def test_cosine_is_at_the_mean_half_way():
    values = rates("cosine", T=12)
    assert values[:2] == [0.5, 1.0]
    assert values[6] == pytest.approx(0.6)  # halfway between steps 1 and 11
    assert values[11] == pytest.approx(0.2)


def test_warmup_stable_decay():
    values = rates("wsd", T=12, decay_fraction=0.25)
    assert values[1:9] == [1.0] * 8
    assert values[8:] == pytest.approx([1.0, 1 - 0.8 / 3, 1 - 1.6 / 3, 0.2])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_edges_are_defined(schedule):
    assert rates(schedule, T=2, warmup_steps=1)[0] == 1.0
    assert 0.2 <= rates(schedule, T=1, warmup_steps=0)[0] <= 1.0
    assert rates(schedule, T=3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


def groups(config, **shape):
    """Return {parameter: (optimizer, weight decay)} of a model of one layer."""
    sizes = dict(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=12, vocab_size=9)
    model = Llama(LlamaConfig(**sizes, max_seq_len=4, **shape))
    checkpoint_blocks(model, "full")  # whose wrappers are in the names that torchtitan matches
    return {
        name: (type(inner).__name__, group["weight_decay"])
        for inner in build_optimizer(model, config)
        for group in inner.param_groups
        for name in group["param_names"]
    }


ATTENTION = [f"layers.0.attention.w{x}.weight" for x in "qkvo"]
MATRICES = [*ATTENTION, *(f"layers.0.feed_forward.w{i}.weight" for i in (1, 2, 3))]
NORMS = ["layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"]
OTHER = {"attention_bias": "qkvo", "ffn_bias": True, "qk_norm": "head"}
OTHER_NORMS = [
    *(f"layers.0.attention.{x}_norm.weight" for x in "qk"),
    *(name.replace("weight", "bias") for name in MATRICES),
]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("shape", "other_norms"), [({}, []), (OTHER, OTHER_NORMS)])
def test_every_parameter_has_the_optimizer_and_weight_decay_of_its_group(
    name, tie, shape, other_norms
):
    shape = shape | {"tie_embeddings": tie}
    embeddings = ["tok_embeddings.weight"] if tie else ["tok_embeddings.weight", "lm_head.weight"]
    blocks = "Muon" if name == "muon" else "AdamW"
    config = OptimConfig(lr=1.0, name=name, weight_decay=0.3)

    def expected(matrices, rest, norms):
        return (
            dict.fromkeys(MATRICES, (blocks, matrices))
            | dict.fromkeys(embeddings, ("AdamW", rest))
            | dict.fromkeys([*NORMS, *other_norms], ("AdamW", norms))
        )

    assert groups(config, **shape) == expected(0.3, 0.3, 0.0)
    own = replace(config, embedding_weight_decay=0.0, norm_weight_decay=0.2)
    assert groups(own, **shape) == expected(0.3, 0.0, 0.2)
    moments = {n: num_moments(n, config) for n in groups(config, **shape)}
    assert {n for n, count in moments.items() if count == 1} == (
        set(MATRICES) if name == "muon" else set()
    )
    assert set(moments.values()) <= {1, 2}


def test_routers_matrices_decay_as_embeddings_and_their_biases_as_norms():
    config = OptimConfig(
        lr=1.0, weight_decay=0.3, embedding_weight_decay=0.1, norm_weight_decay=0.2
    )
    found = groups(config, router="mlp")
    assert {n: g for n, g in found.items() if n.startswith("routers.")} == {
        "routers.0.hidden.weight": ("AdamW", 0.1),
        "routers.0.out.weight": ("AdamW", 0.1),
        "routers.0.out.bias": ("AdamW", 0.2),
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("muon_momentum", 1.0), ("weight_decay", -1.0)]
    + [("embedding_weight_decay", -0.1), ("norm_weight_decay", -0.1)],
)
def test_problems_name_the_field(field, value):
    fine = OptimConfig(lr=1e-3)
    assert fine.problems() == []
    [line] = replace(fine, **{field: value}).problems()
    assert line.startswith(f"optim.{field}: {value}, must ")
