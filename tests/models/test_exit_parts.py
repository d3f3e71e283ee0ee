"""Exits with parts of their own read through them, all others as ever; without, nothing changes."""

import dataclasses
import json

import pytest
import torch

from models.checkpoint_format import Manifest, read_manifest
from models.config import LlamaConfig, config_from_dict
from models.flops import own_exit_params, total_params
from models.llama import Llama
from tests.models.test_llama import build, small

L = 4
EXITS = (1, 3)


def with_own_exits(*, mlp=False, seed=0, **changes):
    """Return a model whose exits' parts differ from the final norm and from each other."""
    model = build(small(n_layers=L, own_exits=EXITS, own_exit_mlp=mlp, **changes), seed)
    shake(model)
    return model.eval().requires_grad_(False)


def shake(model):
    """Draw the exits' norms, which all begin as 1, and make their feed-forwards matter."""
    draw = torch.Generator().manual_seed(8)
    for name, parameter in model.own_exits.named_parameters():
        if parameter.ndim == 1:
            parameter.data.copy_(torch.rand(parameter.shape, generator=draw) + 0.2)
        elif name.endswith("w2.weight"):
            parameter.data.mul_(3)


def slow_norm(x, weight, eps=1e-5):
    return torch.stack([row / (row @ row / len(row) + eps).sqrt() * weight for row in x])


def slow_reading(model, x, E):
    """Return what the head reads of x: (tokens, dim), from the parameters by their names."""
    own = {name: p for name, p in model.named_parameters() if name.startswith(f"own_exits.{E}.")}
    if not own:
        return slow_norm(x, model.norm.weight)
    part = {name.removeprefix(f"own_exits.{E}."): p for name, p in own.items()}
    if "feed_forward.w1.weight" in part:
        w1, w2, w3 = (part[f"feed_forward.w{n}.weight"] for n in (1, 2, 3))
        post, norm = model.config.norm_position == "post", part["ffn_norm.weight"]
        before = x if post else slow_norm(x, norm)
        gate = before @ w1.T
        out = (gate * torch.sigmoid(gate) * (before @ w3.T)) @ w2.T
        x = x + (slow_norm(out, norm) if post else out)
    return slow_norm(x, part["norm.weight"])


@pytest.mark.parametrize(("mlp", "position"), [(False, "pre"), (True, "pre"), (True, "post")])
@pytest.mark.parametrize("tied", [False, True])
def test_every_exit_reads_what_the_slow_form_says(mlp, position, tied):
    model = with_own_exits(mlp=mlp, tie_embeddings=tied, norm_position=position)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    exits = model(tokens, exit_layers=range(L)).exits
    _, states = model.run_layers(model.embed(tokens), 0, L, exit_layers=range(L))
    shared = 0
    for E in range(1, L + 1):
        x = states[E - 1].flatten(0, 1)
        expected = slow_reading(model, x, E)
        close = {"atol": 2e-5, "rtol": 1e-5}
        torch.testing.assert_close(exits[E - 1].flatten(0, 1), expected, **close)
        logits = expected @ (model.tok_embeddings.weight if tied else model.lm_head.weight).T
        torch.testing.assert_close(model.exit_logits(x, E), logits, **close)
        shared += torch.allclose(model.exit_logits(x, E), model.exit_logits(x), atol=1e-3)
    assert shared == L - len(EXITS), "own parts were to matter"


def test_without_exits_of_their_own_a_model_is_what_it_was():
    plain, own = build(small(n_layers=L)), build(small(n_layers=L, own_exits=EXITS))
    names = list(plain.state_dict())
    assert not [name for name in names if "own" in name]
    added = [name for name in own.state_dict() if name not in names]
    assert added == [f"own_exits.{E}.norm.weight" for E in EXITS]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, own.state_dict()[name]), name
    tokens = torch.arange(10)[None]
    ours, theirs = (m(tokens, exit_layers=range(L)).exits for m in (plain, own))
    assert all(torch.equal(ours[l], theirs[l]) for l in range(L)), "norms begin as the final one"


@pytest.mark.parametrize("mlp", [False, True])
def test_copies_are_the_last_layers_parts(mlp):
    model = with_own_exits(mlp=mlp)
    model.norm.weight.mul_(1.5)
    for parts in model.own_exits.values():
        parts.copy_from(model.norm, model.block(L - 1))
    h = torch.randn(5, model.config.dim)
    last = model.block(L - 1)
    after = h + last.feed_forward(last.ffn_norm(h)) if mlp else h
    for E in EXITS:
        assert torch.equal(model.before_head(h, E), model.norm(after))
    model.norm.weight.mul_(2.0)
    assert torch.equal(model.before_head(h, 1), model.before_head(h, 3))
    assert not torch.allclose(model.before_head(h, 1), model.norm(after)), "they are copies"


@pytest.mark.parametrize("mlp", [False, True])
def test_counted_parameters_are_those_the_model_has(mlp):
    config = small(n_layers=L, own_exits=EXITS, own_exit_mlp=mlp)
    with torch.device("meta"):
        model = Llama(config)
    assert total_params(config) == sum(p.numel() for p in model.parameters())
    assert own_exit_params(config) == sum(p.numel() for p in model.own_exits.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"own_exits": (2, 1)}, "model.own_exits: (2, 1), must ascend"),
        ({"own_exits": (1, 1)}, "model.own_exits: (1, 1), must ascend"),
        ({"own_exits": (0,)}, "model.own_exits: (0,), must ascend from 1"),
        ({"own_exits": (4,)}, "below the model's 4"),
        ({"own_exit_mlp": True}, "model.own_exit_mlp: True without model.own_exits"),
    ],
)
def test_exits_that_cannot_be_are_refused(fields, message):
    [problem] = small(n_layers=L, **fields).problems()
    assert message in problem
    assert small(n_layers=L, own_exits=EXITS, own_exit_mlp=True).problems() == []


def test_manifests_keep_them_and_old_ones_have_none(tmp_path):
    config = small(own_exits=(1, 2), own_exit_mlp=True)
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for model in (config, small()):
        Manifest(
            step=1, model=model, config={}, tokenizer_fingerprint="", data_fingerprint="",
            world_size=1, versions={}, files={},
        ).write(tmp_path)  # fmt: skip
        assert read_manifest(tmp_path).model == model
    fields = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("own_exits", "own_exit_mlp"):
        del fields["model"][name]
    del fields["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    assert read_manifest(tmp_path).model == LlamaConfig(**fields["model"]) == small()
