"""Weights in few bits: near the model they were made of, and lossless on their own terms."""

import pytest
import torch

from inference.engine.generation import Generation
from inference.loading.quantized import Int8Linear, bits_of, quantize_layers
from inference.loading.run import load_run
from inference.strategies import speculative
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.speculative import Speculative
from tests.models.families import build_random
from tests.models.test_llama import small

pytest.importorskip("torchao")

OTHER = {"attention_bias": "qkvo", "ffn_bias": True, "qk_norm": "full", "norm_position": "post"}
"""What is no Llama's, and has parts besides the matrices."""


def model(**changes):
    wide = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "n_layers": 3}
    wide |= {"vocab_size": 50} | changes
    return build_random(small(**wide), seed=1).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("bits", "off", "changes"), [("int8", 0.02, {}), ("int4", 0.3, {}), ("int8", 0.02, OTHER)]
)
def test_weights_are_rounded_to_so_many_steps_and_the_model_stays_near(bits, off, changes):
    plain, rounded = model(**changes), model(**changes)
    quantize_layers(rounded, bits)
    weight = rounded.block(0).feed_forward.w1.weight.dequantize()
    exact = plain.block(0).feed_forward.w1.weight
    group = exact.shape[1] if bits == "int8" else 32
    steps = {"int8": 256, "int4": 16}[bits]
    for row in weight.reshape(-1, group):
        assert len(row.unique()) <= steps
    assert 0 < (weight - exact).norm() / exact.norm() < off
    assert torch.equal(plain.head_weight, rounded.head_weight)
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    h, k = (m.run_layers(m.embed(tokens), 0, 3)[0] for m in (plain, rounded))
    assert 0 < (h - k).norm() / h.norm() < 2 * off


@pytest.mark.parametrize("n", [1, 5])
def test_products_in_bfloat16_read_the_bits_as_torchao_does(n):
    ours, torchaos = (model(**OTHER).bfloat16() for _ in range(2))
    quantize_layers(ours, "int8")
    quantize_layers(torchaos.float(), "int8")  # in float32, the products are torchao's
    x = torch.randn(2, n, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("w1", "w3"):
        found = getattr(ours.block(0).feed_forward, name)
        assert isinstance(found, Int8Linear)
        expected = getattr(torchaos.block(0).feed_forward, name)(x.float())
        torch.testing.assert_close(found(x).float(), expected, atol=0.02, rtol=0.02)


def test_products_that_torchs_kernel_cannot_read_are_torchaos():
    rounded = model(ffn_dim=100).bfloat16()
    quantize_layers(rounded, "int8")
    feed_forward = rounded.block(0).feed_forward
    assert isinstance(feed_forward.w1, Int8Linear)
    x = torch.randn(2, 5, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ feed_forward.w2.weight.dequantize().float().T
    torch.testing.assert_close(feed_forward.w2(x).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("bits", "changes"), [("int8", {}), ("int4", {}), ("int4", OTHER)])
def test_self_speculation_keeps_to_the_quantised_model(bits, changes):
    rounded = model(**changes)
    quantize_layers(rounded, bits)
    prompts = [[1, 2, 3], [4, 5]]
    plain = Generation(rounded, prompts, Autoregressive(), max_new_tokens=20).finish()
    drafted = Generation(rounded, prompts, SelfSpeculative(E=1, d=3), max_new_tokens=20).finish()
    assert drafted.tokens == plain.tokens


def test_the_feed_forward_of_an_exit_is_quantised_too():
    plain, rounded = (model(own_exits=(1,), own_exit_mlp=True) for _ in range(2))
    quantize_layers(rounded, "int8")
    h = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    read, exact = (m.exit_logits(h, 1) for m in (rounded, plain))
    assert 0 < (read - exact).norm() / exact.norm() < 0.04


@pytest.mark.parametrize("bits", [None, "int8"])
def test_a_draft_model_is_quantised_as_the_model_is(run_folder, monkeypatch, bits):
    loaded = []

    def load(*args, **options):
        loaded.append(load_run(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(speculative, "load_run", load)
    speculative._load.cache_clear()
    rounded = load_run(run_folder, quantize=bits).model
    decoding = Generation(rounded, [[1, 2]], Speculative(draft=run_folder, d=2), max_new_tokens=9)
    counters = decoding.finish().counters
    assert [bits_of(run.model) for run in loaded] == [bits]
    assert counters.accepted == counters.drafted > 0, "the very same model was to draft"


def test_a_draft_model_that_does_not_fit_is_named(run_folder, monkeypatch):
    def load(path, **options):
        raise ValueError("quantize: int4 needs widths that 32 divides")

    monkeypatch.setattr(speculative, "load_run", load)
    speculative._load.cache_clear()
    rounded = model()
    with pytest.raises(ValueError, match="^draft: quantize: int4 needs widths"):
        Generation(rounded, [[1, 2]], Speculative(draft=run_folder, d=2), max_new_tokens=9)


def test_a_width_that_no_group_divides_is_refused():
    with pytest.raises(ValueError, match=r"^quantize: int4 needs widths that 32 divides, .*int8$"):
        quantize_layers(model(dim=48), "int4")


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[quantize\]"):
        quantize_layers(model(), "int8")


def test_a_run_is_loaded_quantised(run_folder):
    plain, rounded = load_run(run_folder), load_run(run_folder, quantize="int8")
    weight = rounded.model.block(0).attention.wqkv.weight
    assert type(weight.data) is not torch.Tensor
    exact = plain.model.block(0).attention.wqkv.weight
    assert (weight.dequantize() - exact).norm() / exact.norm() < 0.01
