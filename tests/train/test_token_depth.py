"""Training with layers decided token by token, however spread, equals a slow form without ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.loader import Microbatch
from data.shards import NO_LOSS
from models.layer_dropout import LayerDropoutConfig, uniform
from models.llama import Llama
from models.token_depth import TokenDepthConfig, draw_exits
from tests.distributed import run_distributed
from tests.models.families import ALL
from tests.models.token_by_token import token_by_token
from tests.train.loop.test_step import STEP, make_config, plan_of
from tests.train.planning.test_memory import make_work
from train.loop.step import accumulate_gradients
from train.loop.validate import HeldOut, ValidateConfig, validate
from train.parallel.parallelize import ParallelConfig, build_model
from train.planning.memory import measure

ROWS, SEQ = 8, 12
PROMPTS = (0, 3, 0, 5, 1, 0, 11, 2)
"""Labels that are not learnt at the beginning of each row."""
DEPTHS = [
    TokenDepthConfig(),
    TokenDepthConfig(kind="unified"),
    TokenDepthConfig(kind="skipdecode", length=5, min_layers=1),
    TokenDepthConfig(kind="mixed"),
]


def global_batch():
    rows = np.random.default_rng(2).integers(0, 53, (ROWS, SEQ + 1))
    labels = rows[:, 1:].copy()
    for row, prompt in enumerate(PROMPTS):
        labels[row, :prompt] = NO_LOSS
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(labels)


def microbatches_of(runtime, size=2):
    tokens, labels = global_batch()
    rows = torch.arange(ROWS).view(-1, runtime.world_size, size)[:, runtime.rank]
    return [Microbatch(tokens[each], labels[each], each) for each in rows]


def layers_by_hand(config, row, position):
    """Return the layers l of 4 that a token runs."""
    depth, new = config.token_depth, position - PROMPTS[row] - 1
    if depth.kind == "unified" and new >= 0:
        return {0, 3}
    if depth.kind == "skipdecode":
        budget = int(4 - 3 * min(max(new, 0) / 5, 1) + 0.5)
        return {0, *range(4 - budget + 1, 4)}
    if depth.kind == "mixed":
        drawn = draw_exits(depth, 4, seed=config.seed, t=STEP, samples=np.array([row]), seq_len=SEQ)
        return set(range(drawn[0, position]))
    return {0, 1, 2, 3}


def slow_gradients(config):
    """Take J row by row, token by token, with torch's own cross entropy."""
    plan, (tokens, labels) = plan_of(config), global_batch()
    model = Llama(config.model)
    model.init_weights(config.seed)
    J = 0.0
    for row in range(ROWS):
        draws = uniform(config.seed, STEP, 4, np.array([row]))[:, 0]

        def weights(l, states, row=row, draws=draws):
            scale = (draws[l] >= plan.drop_prob[l]) / (1 - plan.drop_prob[l])
            return [scale * (l in layers_by_hand(config, row, position)) for position in range(SEQ)]

        outputs = token_by_token(model, tokens[row], weights)
        for l in plan.exit_layers:
            logits = model.exit_logits(torch.stack(outputs[l]))
            loss = F.cross_entropy(logits, labels[row], reduction="sum", ignore_index=NO_LOSS)
            J = J + plan.exit_weights[l] * loss / (ROWS * SEQ - sum(PROMPTS))
    J.backward()
    return J.detach(), {name: p.grad for name, p in model.named_parameters()}


def check_gradients(runtime, configs):
    for config in configs:
        config.check(runtime.world_size)
        model = build_model(config.model, config.parallel, runtime, config.seed)
        totals = accumulate_gradients(
            model, microbatches_of(runtime), plan_of(config), STEP,
            config=config.step_config, runtime=runtime,
        )  # fmt: skip
        slow_J, slow = slow_gradients(config)
        torch.testing.assert_close(runtime.sum_over_ranks(totals.J), slow_J, atol=1e-6, rtol=1e-6)
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if slow[name] is None else slow[name]
            torch.testing.assert_close(
                parameter.grad.full_tensor(), expected, atol=2e-6, rtol=1e-4, msg=name
            )


HALF = LayerDropoutConfig(p_max=0.5, S="constant", scale_kept=True)


def configs(**changes):
    return [make_config(token_depth=d, layer_dropout=HALF, **changes) for d in DEPTHS]


def test_gradients_on_one_rank_equal_the_slow_form():
    full = ParallelConfig(shard="blocks", activation_checkpointing="full")
    run_distributed(check_gradients, 1, [*configs(), *configs(parallel=full)[3:]])


def test_gradients_on_two_ranks_equal_the_slow_form():
    no_llama = dataclasses.replace(make_config().model, **ALL)
    run_distributed(
        check_gradients, 2, [*configs(), make_config(model=no_llama, layer_dropout=HALF)]
    )


class PromptWindows:
    """The rows of the global batch as held-out sequences."""

    dropped_tokens = 0

    def __len__(self):
        return ROWS

    def read(self, i):
        tokens, labels = global_batch()
        return tokens[i].numpy(), labels[i].numpy()


def check_validation(runtime):
    tokens, labels = global_batch()
    found = {}
    for config in configs():
        model = build_model(config.model, config.parallel, runtime, config.seed)
        losses = validate(
            model, HeldOut(PromptWindows(), SEQ), ValidateConfig(), runtime,
            rows=2, chunk_rows=7, token_depth=config.token_depth,
        )  # fmt: skip
        found[config.token_depth.kind] = losses
        if config.token_depth.kind != "mixed":
            plain, summed = Llama(config.model), 0.0
            plain.init_weights(config.seed)
            for row in range(ROWS):
                outputs = token_by_token(
                    plain,
                    tokens[row],
                    lambda l, states, row=row, config=config: [
                        float(l in layers_by_hand(config, row, position)) for position in range(SEQ)
                    ],
                )
                logits = plain.exit_logits(torch.stack(outputs[3]))
                summed += F.cross_entropy(
                    logits, labels[row], reduction="sum", ignore_index=NO_LOSS
                ).item()
            assert losses[3] == pytest.approx(summed / (ROWS * SEQ - sum(PROMPTS)), abs=1e-5)
    assert found["mixed"] == found["all"]
    assert found["unified"] != found["all"]


def test_validation_runs_the_layers_that_decoding_will():
    run_distributed(check_validation, 2)


def test_packed_documents_that_see_each_other_are_refused():
    for kind in ("unified", "skipdecode"):
        config = make_config(token_depth=TokenDepthConfig(kind=kind))
        data = dataclasses.replace(config.data, packing="documents")
        [problem] = dataclasses.replace(config, data=data).problems(1)
        assert problem.startswith(f"token_depth.kind: {kind} counts from each document's beginning")
        data = dataclasses.replace(data, mask_documents=True)
        assert dataclasses.replace(config, data=data).problems(1) == []


@pytest.mark.parametrize("depth", DEPTHS[1:], ids=lambda depth: depth.kind)
def test_its_memory_can_be_planned(depth):
    work = make_work()
    step = dataclasses.replace(work.step, token_depth=depth)
    plain = measure(work, on_gpu=False).device.total
    assert plain < measure(dataclasses.replace(work, step=step), on_gpu=False).device.total
