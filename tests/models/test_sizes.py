"""Sizes, parameters and FLOPs, against published counts and numbers worked by hand."""

from dataclasses import replace

import pytest
import torch

from models.flops import block_params, total_params, train_flops_per_token
from models.llama import Llama
from models.sizes import SIZES
from tests.models.families import ALL, SHAPES, shape

PUBLISHED = {
    "llama1_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3.2_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen3_0.6b": 596_049_920,
    "olmo2_1b": 1_484_916_736,
    "smollm2_1.7b": 1_711_376_384,
}
BOTH = {"qk_norm": "full", "head_dim": 12}


@pytest.mark.parametrize("name", SIZES)
def test_counted_parameters_are_those_the_model_has(name):
    with torch.device("meta"):
        model = Llama(SIZES[name])
    assert total_params(SIZES[name]) == sum(p.numel() for p in model.parameters())
    assert SIZES[name].problems() == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_sizes_have_the_published_number_of_parameters(name):
    assert total_params(SIZES[name]) == PUBLISHED[name]


def test_the_papers_model_has_its_shape():
    config = SIZES["layerskip_1.5b"]
    assert (config.n_layers, config.dim, config.n_heads, config.max_seq_len) == (24, 2048, 16, 4096)
    assert config.vocab_size == 32000


def test_flops_equal_numbers_worked_by_hand():
    config = SIZES["tiny"]  # dim 32, 4 layers, 4 heads of 8, 2 kv heads, ffn 64, vocab 64
    assert block_params(config) == 2 * 32 * 8 * 6 + 3 * 32 * 64 + 2 * 32
    per_layer = 6 * block_params(config) + 6 * 32 * 10
    head = 6 * 32 * 64
    flops = train_flops_per_token(config, 10, mean_layers=3.5, mean_exits=2)
    assert flops == pytest.approx(3.5 * per_layer + 2 * head)


def test_flops_of_a_sliding_window_count_the_keys_it_reaches():
    config, keys = replace(SIZES["tiny"], sliding_window=4), 0
    for query in range(400):
        keys += min(query + 1, 4)
    with_window, without = (
        train_flops_per_token(each, 400, mean_layers=1, mean_exits=0)
        for each in (config, SIZES["tiny"])
    )
    # 12 for each head, dimension and key; of the whole triangle a query reaches 200 on average.
    assert without - with_window == pytest.approx(12 * 32 * (200 - keys / 400), rel=0.01)


@pytest.mark.parametrize("changes", [*SHAPES.values(), ALL, BOTH], ids=str)
def test_the_parameters_of_every_family_are_counted(changes):
    with torch.device("meta"):
        model = Llama(shape(**changes, own_exits=(1,), own_exit_mlp=True, router="mlp"))
    assert total_params(model.config) == sum(p.numel() for p in model.parameters())


def test_flops_of_exits_of_their_own_and_of_a_frozen_backbone_worked_by_hand():
    config = replace(SIZES["tiny"], own_exits=(1, 2, 3), own_exit_mlp=True)
    own = 6 * (3 * 32 * 64 + 2 * 32)
    plain = train_flops_per_token(config, 10, mean_layers=3, mean_exits=2)
    both = {"mean_layers": 3, "mean_exits": 2, "mean_own_exits": 1.5}
    assert train_flops_per_token(config, 10, **both) == pytest.approx(plain + 1.5 * own)
    # Layers: forward alone, 2 of 6 per weight. Head: forward and the gradient of its input.
    forward = 3 * 2 * (block_params(config) + 32 * 10) + 2 * 4 * 32 * 64
    frozen = train_flops_per_token(config, 10, **both, frozen=True)
    assert frozen == pytest.approx(forward + 1.5 * own)
