"""CUDA graphs of whole rounds: the tokens of rounds that are run, new draws, no waiting."""

from contextlib import contextmanager

import pytest
import torch

from inference.engine.compiled import compile_layers
from inference.engine.cuda_graphs import round_graphs
from inference.engine.generation import Generation
from inference.engine.sampling import Sampling
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload, measure
from inference.strategies import speculative
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.registry import describe
from inference.strategies.self_speculative import SelfSpeculative
from models.host_copy import HostCopy
from tests.inference.engine.test_cuda_graphs import GRAPHABLE, MORE_PROMPTS, counts
from tests.inference.every_strategy import decode, make_model
from tests.models.test_llama import build, small

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def another_model(monkeypatch):
    draft = build(small(n_layers=2, n_kv_heads=2), seed=2).eval().requires_grad_(False).to(CUDA)

    class Loaded:
        model = draft

    monkeypatch.setattr(speculative, "_load", lambda *where: Loaded)


@pytest.fixture(scope="module")
def model():
    return make_model(4).to(CUDA)


@pytest.fixture(scope="module")
def compiled_model():
    model = make_model(4).to(CUDA)
    compile_layers(model)
    return model


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", GRAPHABLE, ids=describe)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tokens_and_counts_are_those_without_graphs(model, strategy, batch_size):
    whole = decode(model, MORE_PROMPTS, strategy).tokens
    graphs = round_graphs(CUDA)
    for stops in ([], [whole[0][4], whole[2][9], whole[5][7]], []):
        options = {"batch_size": batch_size, "stop_tokens": stops}
        plain = decode(model, MORE_PROMPTS, strategy, **options)
        ours = decode(model, MORE_PROMPTS, strategy, graphs=graphs, **options)
        assert ours.tokens == plain.tokens
        assert counts(ours) == counts(plain)


@pytest.mark.parametrize("strategy", GRAPHABLE, ids=describe)
def test_compiled_layers_in_graphs_give_the_same_tokens(model, compiled_model, strategy):
    plain = decode(model, MORE_PROMPTS, strategy, max_new_tokens=60).tokens
    graphs = round_graphs(CUDA)
    for _ in range(2):
        ours = decode(compiled_model, MORE_PROMPTS, strategy, max_new_tokens=60, graphs=graphs)
        assert ours.tokens == plain


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(E=2, d=3)], ids=describe)
def test_every_replay_draws_anew_and_the_seed_decides(strategy):
    model = build(small(n_layers=3)).eval().requires_grad_(False).to(CUDA)
    model.lm_head.weight.zero_()  # all 61 tokens are as probable
    graphs = round_graphs(CUDA)

    def sampled(seed):
        hot = Sampling(temperature=1.0)
        return decode(
            model, [[1, 2]], strategy, max_new_tokens=90, sampling=hot, seed=seed, graphs=graphs
        ).tokens

    first = sampled(1)
    assert len(set(first[0])) > 30
    assert sampled(1) == first != sampled(2)


@pytest.mark.parametrize("strategy", GRAPHABLE, ids=describe)
def test_rounds_that_are_replayed_wait_for_nothing(model, strategy):
    graphs = round_graphs(CUDA)
    options = {"max_new_tokens": 80, "graphs": graphs}
    decode(model, MORE_PROMPTS[:3], strategy, **options)  # has every graph recorded
    decode(model, MORE_PROMPTS[:3], strategy, **options)
    generation = Generation(model, MORE_PROMPTS[:3], strategy, **options)
    next(generation)
    with waiting_is_an_error():
        for _ in range(15):
            next(generation)


def test_a_copy_is_of_the_numbers_as_they_were():
    numbers = torch.arange(10**6, device=CUDA)
    with waiting_is_an_error():
        copy = HostCopy(numbers)
        numbers.zero_()
    assert copy.read() == [*range(10**6)]


def test_memory_that_graphs_hold_is_counted(model):
    graphs = round_graphs(CUDA)
    workload = Workload(
        prompts=MORE_PROMPTS, max_new_tokens=20, batch_size=2, sampling=Sampling(), seed=0
    )
    arms = [AUTOREGRESSIVE, SelfSpeculative(E=2, d=3)]
    found = measure(model, arms, workload, repeats=1, report=str, graphs=graphs)
    assert graphs.idle_bytes() > 0
    assert min(result.peak_bytes for result in found) > graphs.idle_bytes()
