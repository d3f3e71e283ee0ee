"""Fused layers are the same function as plain ones, in fewer operations."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inference.engine.fused import fuse
from inference.engine.fused_block import FusedBlock
from inference.engine.generation import Generation
from inference.engine.products import TransposedLinear, can_pack, pack
from inference.engine.sampling import Sampling
from inference.loading.quantized import quantize_layers
from inference.strategies.registry import parse_strategy
from tests.inference.every_strategy import PROMPTS, decode
from tests.models.families import ALL, SHAPES, build_random
from tests.models.test_llama import build, small

STRATEGIES = (
    "autoregressive",
    "self_speculative:E=2:d=3",
    "self_speculative:E=3:d=4:ngram=2:stop=0.02",
    "self_speculative:E=2:d=3:branch=3",
    "dynamic:d=3",
    "skip_draft:d=3:gamma=0.05",
    "free:rollback=exact:threshold=0.02",
    "calm:threshold=0.02",
    "unified:speedup=2",
)
MODELS = {
    "Llama": {},
    "whole heads": {"n_kv_heads": 4},
    "all": ALL,
    "post": {"norm_position": "post", "sliding_window": 5},
    "routed": {"router": "linear"},
    "own exits": {"own_exits": (2, 4), "own_exit_mlp": True},
    **SHAPES,
}


def plain_and_fused(changes, **options):
    plain = build_random(small(**({"n_layers": 6, "n_kv_heads": 2} | changes)), seed=2)
    for name, weight in plain.named_parameters():
        if name.endswith(("wo.weight", "w2.weight")):
            weight.data.mul_(2)
    plain.eval().requires_grad_(False)
    fused = deepcopy(plain)
    fuse(fused, **options)
    return plain, fused


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_exit_gives_the_same_logits(changes):
    plain, fused = plain_and_fused(changes)
    if can_pack(fused):
        pack(fused)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    for model in (plain, fused):
        assert isinstance(model.block(0), FusedBlock) == (model is fused)
    x = [
        model.run_layers(model.embed(tokens), 0, 6, exit_layers=range(6))[1]
        for model in (plain, fused)
    ]
    for l in range(6):
        expected, found = plain.exit_logits(x[0][l], l + 1), fused.exit_logits(x[1][l], l + 1)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_decodes_the_same_tokens(name):
    plain, fused = plain_and_fused(MODELS[name])
    if can_pack(fused):
        pack(fused)
    for text in STRATEGIES[:3] if name in SHAPES else STRATEGIES:
        strategy = parse_strategy(text)
        expected = decode(plain, PROMPTS, strategy, batch_size=3, stop_tokens=[5])
        found = decode(fused, PROMPTS, strategy, batch_size=3, stop_tokens=[5])
        assert found.tokens == expected.tokens, text
        assert found.counters.accepted == expected.counters.accepted, text
        assert found.counters.token_layers == expected.counters.token_layers, text


def test_sampled_tokens_are_the_same_draws():
    plain, fused = plain_and_fused({})
    options = {"sampling": Sampling(temperature=0.8, top_p=0.9), "seed": 3, "batch_size": 3}
    for text in STRATEGIES[:4]:
        strategy = parse_strategy(text)
        expected = decode(plain, PROMPTS, strategy, **options).tokens
        assert decode(fused, PROMPTS, strategy, **options).tokens == expected, text


def test_bits_of_fused_matrices_are_those_of_plain_ones():
    pytest.importorskip("torchao")
    plain, fused = plain_and_fused({}, compiled=True)
    for model in (plain, fused):
        quantize_layers(model, "int8")
    strategy = parse_strategy(STRATEGIES[1])
    assert decode(fused, PROMPTS, strategy).tokens == decode(plain, PROMPTS, strategy).tokens


def test_threads_decode_from_one_model():
    _, fused = plain_and_fused({})
    pack(fused)
    strategy = parse_strategy("self_speculative:E=2:d=3")
    alone = [decode(fused, [prompt], strategy).tokens for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        for _ in range(5):
            found = threads.map(lambda prompt: decode(fused, [prompt], strategy).tokens, PROMPTS)
            assert list(found) == alone


def test_a_copy_has_weights_of_its_own():
    _, fused = plain_and_fused({})
    pack(fused)
    strategy = parse_strategy("autoregressive")
    tokens = decode(fused, PROMPTS, strategy).tokens
    copy = deepcopy(fused)
    for parameter in [*fused.parameters(), *(m.transposed for m in linears(fused))]:
        parameter.zero_()
    assert decode(copy, PROMPTS, strategy).tokens == tokens
    assert decode(fused, PROMPTS, strategy).tokens != tokens


def linears(model):
    return [m for m in model.modules() if isinstance(m, TransposedLinear)]


def test_the_default_dtype_does_not_matter():
    plain, fused = plain_and_fused({})
    pack(fused)
    strategy = parse_strategy("autoregressive")
    tokens = decode(plain, PROMPTS, strategy).tokens
    torch.set_default_dtype(torch.float64)
    try:
        assert decode(fused, PROMPTS, strategy).tokens == tokens
    finally:
        torch.set_default_dtype(torch.float32)


class Calls(TorchDispatchMode):
    """Counts calls of torch's operations, those that only view a tensor too."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("text", "most"), [("autoregressive", 21), ("self_speculative:E=4:d=4", 23.5)]
)
def test_calls_per_token_and_layer(text, most):
    """Before layers were fused: 44 and 47, the rest of a round included."""
    shape = {"dim": 128, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 352}
    model = build(small(n_layers=8, **shape), seed=0).eval().requires_grad_(False)
    fuse(model)
    pack(model)
    strategy = parse_strategy(text)
    generation = Generation(model, [PROMPTS[2]], strategy, max_new_tokens=40)
    rounds = iter(generation)
    next(rounds)
    counters = generation.counters
    before = sum((stop - start) * n for (start, stop, _), n in counters.passes.items())
    with Calls() as calls:
        for _ in range(3):
            next(rounds)
    layers = sum((stop - start) * n for (start, stop, _), n in counters.passes.items()) - before
    assert calls.counts.total() / layers <= most
