"""The moving average of the weights against a slow one."""

import torch

from models.llama import Llama
from tests.distributed import run_distributed
from tests.train.tiny import MODEL
from train.optimizer.weight_average import WeightAverage, ema_decay
from train.parallel.parallelize import ParallelConfig, build_model


def test_the_average_forgets_the_start_and_skips_steps_that_update_nothing():
    model = Llama(MODEL)
    model.init_weights(0)
    average = WeightAverage(model, 0.8)
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for t in range(60):
        bad = t % 7 == 3
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(t)))
        average.update_unless(torch.tensor(bad), t)
        d = min(0.8, (1 + t) / (10 + t))
        assert ema_decay(0.8, t) == d
        for name, p in model.named_parameters() if not bad else ():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    for name, value in average.tensors.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_averages_stand_in_for_the_weights_and_give_them_back_bit_for_bit():
    model = Llama(MODEL)
    model.init_weights(0)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = {n: value.clone() for n, value in average.tensors.items()}
    with average.in_place():
        assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(value, kept[n]) for n, value in average.tensors.items())
    average.restart()
    assert all(torch.equal(average.tensors[n], value) for n, value in before.items())


def check_forward_passes(runtime):
    tokens = torch.arange(6).view(1, 6)

    def last(model):
        return model(tokens, exit_layers=[1]).exits[1]

    plain = Llama(MODEL)
    plain.init_weights(0)
    for fields in ({}, {"shard": "blocks"}, {"shard": "blocks", "reshard_after_forward": False}):
        model = build_model(MODEL, ParallelConfig(**fields), runtime, 0)
        average = WeightAverage(model, 0.9)
        with torch.no_grad():
            expected = last(plain)
            for p in model.parameters():
                p.mul_(1.7)
            own = last(model)  # which leaves weights gathered
            with average.in_place():
                torch.testing.assert_close(last(model), expected)
            torch.testing.assert_close(last(model), own)
            assert not torch.allclose(own, expected)


def test_forward_passes_are_of_the_averages_however_sharded():
    run_distributed(check_forward_passes, 2)
