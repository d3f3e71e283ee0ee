"""Products in other layouts are the plain ones."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from inference.engine import products
from inference.engine.compiled import compile_layers
from inference.engine.fused import fuse
from inference.engine.generation import Generation
from inference.engine.products import (
    PackedLinear,
    TransposedLinear,
    add_product,
    can_pack,
    pack,
)
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.self_speculative import SelfSpeculative
from tests.inference.every_strategy import decode
from tests.models.families import build_random
from tests.models.test_llama import small

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)

BIASES = {"attention_bias": "qkvo", "ffn_bias": True}


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("form", ["packed", "kept", "transposed"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_products_are_as_exact_as_plain_ones(rows, form, dtype, error):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 320, generator=draw).to(dtype)
    x = torch.randn(*rows, 320, generator=draw).to(dtype)
    exact = x.double() @ weight.double().T
    for bias in (None, torch.randn(96, generator=draw).to(dtype)):
        linear = (
            TransposedLinear(weight, bias)
            if form == "transposed"
            else PackedLinear(weight, bias, keep=form == "kept")
        )
        found = linear(x)
        assert found.shape == exact.shape
        assert found.dtype == dtype
        expected = exact if bias is None else exact + bias.double()
        close = {"atol": error * 320**0.5, "rtol": error}
        torch.testing.assert_close(found.double(), expected, **close)
        if form == "transposed" and x.ndim == 2:
            added = add_product(found, linear, x)
            torch.testing.assert_close(added.double(), 2 * expected, **close)
            assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, BIASES], ids=str)
def test_a_packed_model_decodes_the_same_tokens(monkeypatch, changes):
    monkeypatch.setattr(products, "PACKED_ELEMENTS", 1000)
    monkeypatch.setattr(products, "TRANSPOSED_ELEMENTS", 800)
    monkeypatch.setattr(products, "KEPT_ELEMENTS", 0)
    model = build_random(small(n_layers=4, n_kv_heads=2, **changes)).eval().requires_grad_(False)
    prompts = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
    plain = Generation(model, prompts, Autoregressive(), max_new_tokens=20).finish().tokens
    head = model.head_weight.clone()
    assert can_pack(model)
    pack(model)
    block = model.block(0)
    assert isinstance(block.feed_forward.w1, PackedLinear)
    assert block.feed_forward.w1.weight is None
    assert isinstance(block.attention.wk, TransposedLinear), "512 elements"
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.head_weight, head)
    for strategy in (Autoregressive(), SelfSpeculative(E=2, d=3)):
        assert Generation(model, prompts, strategy, max_new_tokens=20).finish().tokens == plain


def test_the_head_keeps_its_weight_in_bfloat16_too(monkeypatch):
    monkeypatch.setattr(products, "PACKED_ELEMENTS", 1000)
    model = build_random(small(n_layers=2)).bfloat16().eval().requires_grad_(False)
    head = model.head_weight.clone()
    pack(model)
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.head_weight, head)
    assert model.block(0).feed_forward.w1.weight is None


def test_one_row_takes_the_plain_weight_where_it_is_kept():
    weight = torch.randn(8, 16)
    x = torch.randn(1, 1, 16)
    assert torch.equal(PackedLinear(weight, keep=True)(x), F.linear(x, weight))
    assert PackedLinear(weight).weight is None
    assert PackedLinear(weight.bfloat16(), keep=True).weight is not None
    assert not PackedLinear(weight.bfloat16(), keep=True).plain_for_one


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for CPUs with c++")
def test_compiled_layers_with_packed_weights_give_the_same_tokens(monkeypatch):
    config = small(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab_size=61)
    model = build_random(replace(config, **BIASES)).eval().requires_grad_(False)
    strategy, options = SelfSpeculative(E=1, d=1), {"max_new_tokens": 2}  # passes of two shapes
    plain = decode(model, [[3]], strategy, **options).tokens
    fuse(model, compiled=True)
    monkeypatch.setattr(products, "TRANSPOSED_ELEMENTS", products.PACKED_ELEMENTS)
    pack(model)
    assert isinstance(model.block(0).feed_forward.w13, PackedLinear)
    assert isinstance(model.block(0).attention.wo, TransposedLinear)
    compile_layers(model)
    assert decode(model, [[3]], strategy, **options).tokens == plain
