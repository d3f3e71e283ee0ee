"""Slots are written at their positions, and only written ones are read."""

from types import SimpleNamespace

import pytest
import torch

from inference.engine.compiled import compile_layers, window_step
from inference.engine.kv_cache import StaticKVCache
from inference.engine.prefill import allocate
from inference.engine.sampling import Sampling
from tests.models.families import ALL, build_random, shape
from tests.models.test_llama import small


def open_cache(batch=2, slots=6):
    config = small(dim=8, n_heads=2, n_kv_heads=1, n_layers=2)
    return StaticKVCache(config, batch, slots, device=torch.device("cpu"), dtype=torch.float32)


def test_mask_shows_the_slots_up_to_each_position():
    cache = open_cache()
    cache.window = 5
    mask, _ = cache.at(torch.tensor([[0, 1], [3, 4]]))
    assert mask.shape == (2, 1, 2, 5)
    assert mask[:, 0].exp().int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    ]


def test_windows_and_buffers_are_rounded_up_to_steps():
    config = small(dim=8, n_heads=2, n_kv_heads=1, n_layers=2)
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    cache = StaticKVCache(config, 1, 10, window_step=4, **where)
    windows = []
    for slots in (1, 3, 4, 5, 8, 9, 10):
        cache.set_window(slots)
        windows.append(cache.window)
    assert windows == [4, 4, 4, 8, 8, 12, 12]
    assert (cache.slots, cache.keys[0].shape[2]) == (10, 12)


def test_each_row_is_written_at_its_own_positions_in_one_layer():
    cache = open_cache()
    cache.window = 4
    _, layer = cache.at(torch.tensor([[0, 1], [2, 3]]))
    k = torch.arange(1.0, 17.0).view(2, 1, 2, 4)
    keys, values = layer(1).update(k, -k)
    assert keys.shape == (2, 1, 4, 4)
    assert torch.equal(keys[0, :, :2], k[0])
    assert torch.equal(keys[1, :, 2:], k[1])
    assert torch.equal(values, -keys)
    assert keys[0, :, 2:].abs().sum() == keys[1, :, :2].abs().sum() == 0
    assert cache.keys[0].abs().sum() == 0


def test_a_position_written_again_is_overwritten():
    cache = open_cache(batch=1)
    for value in (1.0, 2.0):
        _, layer = cache.at(torch.tensor([[3]]))
        keys, _ = layer(0).update(torch.full((1, 1, 1, 4), value), torch.zeros(1, 1, 1, 4))
    assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 2, 0, 0]


@pytest.mark.parametrize("changes", [{}, ALL], ids=["Llama", "no Llama"])
def test_keys_and_values_of_a_token_that_skips_are_those_of_one_that_runs(changes):
    model = build_random(shape(**changes))
    h, positions = torch.randn(2, 3, 32), torch.tensor([[4, 5, 6], [0, 1, 2]])
    ran, skipped = (
        StaticKVCache(model.config, 2, 8, device=h.device, dtype=h.dtype) for _ in range(2)
    )
    with torch.no_grad():
        model.run_layers(h, 1, 2, positions=positions, cache=ran)
        model.write_keys_and_values(h, 1, 2, positions=positions, cache=skipped)
    assert ran.keys[1].any()
    assert torch.equal(ran.keys[1], skipped.keys[1])
    assert torch.equal(ran.values[1], skipped.values[1])


@pytest.mark.parametrize(("on_gpu", "step"), [(False, 1), (True, 128)])
def test_windows_on_a_gpu_have_few_sizes(on_gpu, step):
    weight = SimpleNamespace(is_cuda=on_gpu)
    norm = SimpleNamespace(weight=weight)
    model = SimpleNamespace(run_layers=None, norm=norm)
    assert window_step(model) == step


def test_caches_of_compiled_models_are_of_few_sizes_and_one_kind():
    model, slots = build_random(shape()), []
    for compiled in (False, True):
        if compiled:
            compile_layers(model)  # which compiles nothing yet
        for needed in (3, 100, 130):
            with torch.inference_mode(needed == 3):
                cache = allocate(model, 1, slots=needed, sampling=Sampling(), seed=0).cache
            assert not cache.keys[0].is_inference()
            slots.append(cache.keys[0].shape[2])
    assert slots == [3, 100, 130, 128, 128, 256]
