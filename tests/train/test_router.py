"""A model with routers is trained, however it is spread, as by one plain process token by token."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.shards import NO_LOSS
from loss.density import DensityConfig
from models.flops import layer_flops_per_token, router_params, total_params
from models.layer_dropout import LayerDropoutConfig, uniform
from models.llama import Llama
from models.router import RouterConfig
from tests.distributed import run_distributed
from tests.models.families import ALL
from tests.models.test_router import scramble, straight_through
from tests.models.token_by_token import token_by_token
from tests.train.loop.test_step import STEP, make_config, plan_of
from tests.train.parallel.test_parallelize import compile_with
from tests.train.planning.test_memory import make_work
from tests.train.test_token_depth import PROMPTS, ROWS, SEQ, global_batch, microbatches_of
from train.loop.report import StepReport
from train.loop.step import accumulate_gradients, train_step
from train.loop.step_metrics import DeferredReader
from train.optimizer.optim import build_optimizer
from train.parallel.parallelize import ParallelConfig, _write_shard, build_model
from train.planning.memory import measure

HALF = LayerDropoutConfig(p_max=0.5, S="constant", scale_kept=True)


def make(router="linear", capacity=1.0, layer_dropout=HALF, shape=None, **parallel):
    return make_config(
        model=dataclasses.replace(make_config().model, router=router, **(shape or {})),
        router=RouterConfig(capacity=capacity),
        density=DensityConfig(weight=3.0, target=0.2),
        layer_dropout=layer_dropout,
        parallel=ParallelConfig(shard="blocks", **parallel),
    )


def slow_gradients(config):
    """Take J row by row, token by token; return it, the share that runs, and the gradients."""
    plan, (tokens, labels) = plan_of(config), global_batch()
    model = Llama(config.model)
    model.init_weights(config.seed)
    scramble(model)
    J, running = 0.0, 0.0
    for row in range(ROWS):
        draws, gates = uniform(config.seed, STEP, 4, np.array([row]))[:, 0], []

        def weights(l, states, draws=draws, gates=gates):
            p, w = straight_through(model, l, states, config.router.capacity)
            gates.extend(p)
            scale = (draws[l] >= plan.drop_prob[l]) / (1 - plan.drop_prob[l])
            return [float(scale) * each for each in w]

        outputs = token_by_token(model, tokens[row], weights)
        for l in plan.exit_layers:
            logits = model.exit_logits(torch.stack(outputs[l]))
            loss = F.cross_entropy(logits, labels[row], reduction="sum", ignore_index=NO_LOSS)
            J = J + plan.exit_weights[l] * loss / (ROWS * SEQ - sum(PROMPTS))
        density = torch.stack(gates)
        J = J + 3.0 * (density.mean() - 0.2) ** 2 / ROWS
        running += (density > 0.5).float().mean().item() / ROWS
    J.backward()
    return J.detach(), running, {name: p.grad for name, p in model.named_parameters()}


def build(config, runtime):
    config.check(runtime.world_size)
    model = build_model(config.model, config.parallel, runtime, config.seed)
    scramble(model, _write_shard)
    return model


def check_gradients(runtime, configs, backend=None):
    if backend is not None:
        compile_with(backend)
    for config in configs:
        torch._dynamo.reset()
        model = build(config, runtime)
        totals = accumulate_gradients(
            model, microbatches_of(runtime), plan_of(config), STEP,
            config=config.step_config, runtime=runtime,
        )  # fmt: skip
        slow_J, running, slow = slow_gradients(config)
        assert 0.2 < running < 0.8
        torch.testing.assert_close(runtime.sum_over_ranks(totals.J), slow_J, atol=1e-6, rtol=1e-6)
        assert runtime.sum_over_ranks(totals.density).item() == pytest.approx(running, abs=1e-6)
        assert slow["routers.0.out.weight"].abs().max() > 1e-3
        for name, parameter in model.named_parameters():
            # Norms after a part divide by what may be small: 3e-5 of the largest on torch 2.11.
            atol = max(2e-6, 5e-5 * slow[name].abs().max().item())
            torch.testing.assert_close(
                parameter.grad.full_tensor(), slow[name], atol=atol, rtol=1e-4, msg=name
            )


CASES = [make(), make("mlp", capacity=0.4)]


def test_gradients_on_one_rank_equal_the_slow_form():
    cases = [*CASES, make(capacity=0.4, activation_checkpointing="full")]
    run_distributed(check_gradients, 1, cases)


def test_gradients_on_two_ranks_equal_the_slow_form():
    cases = [*CASES, make(capacity=0.4, dp_replicate=2)]
    run_distributed(check_gradients, 2, cases)


def test_gradients_of_compiled_blocks_equal_the_slow_form():
    full = {"compile": True, "activation_checkpointing": "full"}
    cases = [make(capacity=0.4, compile=True), make(shape=ALL, **full)]
    run_distributed(check_gradients, 2, cases, "aot_eager")


class NoThroughput:
    def add(self, tokens, plan):
        pass

    def read(self, seconds):
        return {}


def check_metric(runtime):
    config = CASES[1]
    model = build(config, runtime)
    optimizer = build_optimizer(model, config.optim)
    decays = {
        name: group["weight_decay"]
        for inner in optimizer
        for group in inner.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    assert decays["routers.1.out.bias"] == 0
    assert decays["routers.1.out.weight"] == decays["layers.1.attention.wq.weight"] > 0
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    result = train_step(
        model, optimizer, microbatches_of(runtime), plan_of(config), STEP,
        config=config.step_config, runtime=runtime,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter.full_tensor(), before[name]), name
    reader = DeferredReader()
    reader.push(STEP, result)
    [metrics] = reader.drain()
    assert metrics.finite
    slow_J, running, _ = slow_gradients(config)
    assert pytest.approx(slow_J.item(), abs=1e-5) == metrics.J
    for routed in (True, False):
        report = StepReport(4, NoThroughput(), routed=routed)
        report.add(metrics, plan_of(config), tokens=96)
        read = report.read(STEP + 1, lr=0.1, seconds=1.0, waited=0.0)
        assert read.get("train/router_density") == (
            pytest.approx(running, abs=1e-6) if routed else None
        )


def test_the_density_is_a_metric_of_all_ranks_and_every_router_learns():
    run_distributed(check_metric, 2)


def test_what_needs_routers_is_refused_without_them():
    for changes in ({"router": RouterConfig(capacity=0.5)}, {"density": DensityConfig(weight=1.0)}):
        [problem] = make_config(**changes).problems(1)
        assert problem.startswith("router.capacity, density.weight: given for a model without")
    assert make("mlp", capacity=0.5).problems(1) == []


@pytest.mark.parametrize("router", ["none", "linear", "mlp"])
def test_parameters_and_flops_count_the_routers(router):
    config = make(router=router).model
    with torch.device("meta"):
        model = Llama(config)
    assert total_params(config) == sum(p.numel() for p in model.parameters())
    assert router_params(config) == {"none": 0, "linear": 25, "mlp": 24 * 6 + 6 + 1}[router]
    # dim 24, 4 heads and 2 for keys of width 6, ffn 40; 10 tokens. Keys and values are of all.
    all_tokens = 6 * (2 * 24 * 12 + 24 + router_params(config))
    some = 6 * (2 * 24 * 24 + 3 * 24 * 40 + 24) + 6 * 24 * 10
    assert layer_flops_per_token(config, 10) == all_tokens + some
    assert layer_flops_per_token(config, 10, capacity=0.25) == all_tokens + 0.25 * some


def test_its_memory_can_be_planned_and_capacity_lessens_it():
    work = make_work()
    work = dataclasses.replace(work, model=dataclasses.replace(work.model, router="linear"))
    totals = []
    for capacity in (1.0, 0.25):
        step = dataclasses.replace(work.step, capacity=capacity)
        need = measure(dataclasses.replace(work, step=step), on_gpu=False)
        totals.append(need.device.parts["activations"])
    assert totals[1] < 0.7 * totals[0]
