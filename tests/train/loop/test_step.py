"""Gradients of J on any number of ranks equal a slow form without ranks."""

import dataclasses
from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data.loader import TokenLoader
from data.mixture import Mixture
from data.shards import TokenStream
from data.windows import StreamWindows
from loss.cross_entropy import ExitTokens, weighted_cross_entropy_sums
from loss.curriculum import CurriculumConfig
from loss.early_exit import EarlyExitConfig
from loss.softmax import IGNORE_INDEX
from models.config import LlamaConfig
from models.layer_dropout import LayerDropoutConfig, uniform
from models.llama import Llama
from tests.batches import batch_at
from tests.distributed import run_distributed
from train.config.config import TrainConfig
from train.loop.data_config import DataConfig
from train.loop.exit_tokens import DRAW
from train.loop.layerskip import LayerSkipSchedule
from train.loop.step import accumulate_gradients, dropout_keys, train_step
from train.optimizer.optim import OptimConfig, build_optimizer, lr
from train.parallel.parallelize import ParallelConfig, build_model

STEP = 5  # all of p(l, t), C(t, l) and the data order are in full swing


def make_config(tie=False, dp_replicate=1, microbatch_size=2, **changes) -> TrainConfig:
    fields = dict(
        name="test",
        steps=8,
        seed=3,
        model=LlamaConfig(
            dim=24, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=40, vocab_size=53,
            max_seq_len=16, tie_embeddings=tie,
        ),
        data=DataConfig(
            path="", seq_len=12, global_batch_size=8, microbatch_size=microbatch_size
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, max_grad_norm=1e9),
        layer_dropout=LayerDropoutConfig(p_max=0.9, S="constant", scale_kept=True),
        curriculum=CurriculumConfig(C="rot", R=2),
        early_exit=EarlyExitConfig(e_scale=0.5, chunk_rows=7),
        parallel=ParallelConfig(shard="blocks", dp_replicate=dp_replicate),
    )  # fmt: skip
    return TrainConfig(**(fields | changes))


def make_loader(config, rank=0, world_size=1) -> TokenLoader:
    tokens = np.random.default_rng(0).integers(0, 53, 2000).astype(np.uint16)
    windows = StreamWindows(TokenStream([tokens]), config.data.seq_len)
    return TokenLoader(
        Mixture([windows], seed=config.seed),
        global_batch_size=config.data.global_batch_size,
        microbatch_size=config.data.microbatch_size,
        rank=rank,
        world_size=world_size,
    )


def plan_of(config):
    return LayerSkipSchedule(
        layer_dropout=config.layer_dropout,
        curriculum=config.curriculum,
        early_exit=config.early_exit,
        L=config.model.n_layers,
        T=config.steps,
    ).at(STEP)


def slow_gradients(config):
    """Take J sample by sample, layer by layer, with torch's own cross entropy."""
    plan = plan_of(config)
    model = Llama(config.model)
    model.init_weights(config.seed)
    cos, sin = model.rope_cos[None, None, :12], model.rope_sin[None, None, :12]
    J = 0.0
    one_by_one = dataclasses.replace(
        config, data=dataclasses.replace(config.data, microbatch_size=1)
    )
    for sample in batch_at(make_loader(one_by_one), STEP):
        draws = uniform(config.seed, STEP, 4, sample.samples.numpy())[:, 0]
        x = model.embed(sample.tokens)
        for l in range(4):
            if draws[l] >= plan.drop_prob[l]:
                out = model.layers[str(l)](x, cos, sin)
                x = x + (out - x) / (1 - plan.drop_prob[l])
            if l in plan.exit_layers:
                logits = model.exit_logits(x)[0]
                J = J + plan.exit_weights[l] * F.cross_entropy(
                    logits, sample.labels[0], reduction="sum"
                ) / (8 * 12)
    J.backward()
    return J.detach(), {name: p.grad for name, p in model.named_parameters()}


def check_gradients(runtime, config):
    config.check(runtime.world_size)
    model = build_model(config.model, config.parallel, runtime, config.seed)
    microbatches = batch_at(make_loader(config, runtime.rank, runtime.world_size), STEP)
    totals = accumulate_gradients(
        model, microbatches, plan_of(config), STEP, config=config.step_config, runtime=runtime
    )
    slow_J, slow = slow_gradients(config)
    torch.testing.assert_close(runtime.sum_over_ranks(totals.J), slow_J, atol=1e-6, rtol=1e-6)
    assert runtime.sum_over_ranks(totals.exit_tokens).tolist() == [0, 96, 0, 96]
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor()
        torch.testing.assert_close(grad, slow[name], atol=2e-6, rtol=1e-4, msg=name)


def check_gradients_of_all(runtime, configs):
    for config in configs:
        check_gradients(runtime, config)


def test_gradients_on_one_rank_equal_the_slow_form():
    run_distributed(check_gradients_of_all, 1, [make_config(), make_config(tie=True)])


def test_gradients_on_two_ranks_equal_the_slow_form():
    configs = [
        make_config(),
        make_config(tie=True, microbatch_size=1),
        make_config(microbatch_size=4),
        make_config(parallel=ParallelConfig(shard="blocks", reshard_after_forward=False)),
    ]
    run_distributed(check_gradients_of_all, 2, configs)


def test_gradients_on_four_ranks_sharded_and_hybrid_equal_the_slow_form():
    configs = [make_config(), make_config(tie=True, dp_replicate=2)]
    run_distributed(check_gradients_of_all, 4, configs)


EVERY_LOSS = dict(
    curriculum=CurriculumConfig(C="all"),
    early_exit=EarlyExitConfig(
        weights="linear", exits=(1, 3), chunk_rows=7, distill=0.3, temperature=2.0,
        distill_states="dynamic", distill_states_weight=0.7, z_loss=0.02,
        confidence_weights=True, token_fraction=0.4,
    ),
)  # fmt: skip


def with_unlabelled(batch):
    """Take the label of about every third token away, more in one sequence than in another."""
    found = []
    for microbatch in batch:
        gone = (microbatch.tokens + microbatch.samples[:, None]) % 3 == 0
        labels = microbatch.labels.masked_fill(gone, IGNORE_INDEX)
        found.append(dataclasses.replace(microbatch, labels=labels))
    return found


def slow_losses(config):
    """Take J of EVERY_LOSS sample by sample, from whole logits in float64.

    Exits after 1, 3 and all 4 layers, weighing 1/8, 3/8 and 4/8; the first two see 5 of 12 tokens.
    Students are layers 0 to 2, teachers ceil(4 i / 3) - 1 = 1, 2 and 3.
    """
    model = Llama(config.model)
    model.init_weights(config.seed)
    model.double()
    cos, sin = model.rope_cos[None, None, :12], model.rope_sin[None, None, :12]
    plan, J, num_tokens = plan_of(config), 0.0, 0
    one_by_one = dataclasses.replace(
        config, data=dataclasses.replace(config.data, microbatch_size=1)
    )
    for sample in with_unlabelled(batch_at(make_loader(one_by_one), STEP)):
        number, labels = sample.samples.numpy(), sample.labels[0]
        draws = uniform(config.seed, STEP, 4, number)[:, 0]
        order = uniform(config.seed ^ DRAW, STEP, 12, number)[:, 0].argsort()
        seen, has_loss = set(order[:5].tolist()), labels != IGNORE_INDEX
        num_tokens += has_loss.sum()
        x, states = model.embed(sample.tokens), []
        for l in range(4):
            if draws[l] >= plan.drop_prob[l]:
                out = model.layers[str(l)](x, cos, sin)
                x = x + (out - x) / (1 - plan.drop_prob[l])
            states.append(model.norm(x)[0])
        logits = [state @ model.head_weight.T for state in states]
        for s in has_loss.nonzero().flatten().tolist():
            p = (logits[3][s] / 2).softmax(-1).detach()
            for l, weight in ((0, 1 / 8), (2, 3 / 8), (3, 4 / 8)):
                z = logits[l][s]
                loss = F.cross_entropy(z, labels[s]) + 0.02 * z.logsumexp(-1) ** 2
                if l < 3:
                    kl = 4 * (p * (p.log() - (z / 2).log_softmax(-1))).sum()
                    loss = 0.7 * z.softmax(-1).max().detach() * loss + 0.3 * kl
                    loss = loss * (s in seen) * 12 / 5
                J = J + weight * loss
        bound = 3
        for teacher in (3, 2, 1):
            mse = [(states[l] - states[teacher].detach())[has_loss].pow(2).mean() for l in range(3)]
            bound = min(range(bound), key=lambda l, mse=mse: mse[l].item(), default=0)
            J = J + 0.7 * mse[bound] / 3 * has_loss.sum()
    J = J / num_tokens
    J.backward()
    return J.detach(), {name: p.grad for name, p in model.named_parameters()}


def check_losses(runtime, configs):
    for config in configs:
        config.check(runtime.world_size)
        model = build_model(config.model, config.parallel, runtime, config.seed)
        batch = with_unlabelled(
            batch_at(make_loader(config, runtime.rank, runtime.world_size), STEP)
        )
        totals = accumulate_gradients(
            model, batch, plan_of(config), STEP, config=config.step_config, runtime=runtime
        )
        slow_J, slow = slow_losses(config)
        torch.testing.assert_close(
            runtime.sum_over_ranks(totals.J), slow_J.float(), atol=2e-6, rtol=1e-6
        )
        for name, parameter in model.named_parameters():
            grad = parameter.grad.full_tensor()
            expected = slow[name].float()
            torch.testing.assert_close(grad, expected, atol=2e-6, rtol=1e-4, msg=name)


def test_every_loss_option_equals_the_slow_form_on_one_rank_and_two():
    for ranks in (1, 2):
        configs = [make_config(**EVERY_LOSS, microbatch_size=n, tie=n == 4) for n in (1, 2, 4)]
        run_distributed(check_losses, ranks, configs)


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that reach the process group."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[str(function.overloadpacket)] += 1
        return function(*arguments, **(keywords or {}))


def count_communication(runtime):
    for tie in (False, True):
        for curriculum in (CurriculumConfig(), CurriculumConfig(C="all")):
            config = make_config(tie=tie, microbatch_size=4, curriculum=curriculum)
            model = build_model(config.model, config.parallel, runtime, config.seed)
            batch = batch_at(make_loader(config, runtime.rank, runtime.world_size), STEP)
            with CollectiveCounter() as counter:
                accumulate_gradients(
                    model, batch, plan_of(config), STEP, config=config.step_config, runtime=runtime
                )
            gathers = sum(n for name, n in counter.counts.items() if "gather" in name)
            reduces = sum(n for name, n in counter.counts.items() if "reduce_scatter" in name)
            # 4 blocks, gathered for forward and backward; the root, once. Each is reduced once.
            assert (gathers, reduces) == (9, 5), counter.counts


def test_the_root_is_gathered_once_and_reduced_once_however_many_exits():
    run_distributed(count_communication, 2)


def check_plain(runtime):
    config = make_config(
        layer_dropout=LayerDropoutConfig(), curriculum=CurriculumConfig(), microbatch_size=4
    )
    model = build_model(config.model, config.parallel, runtime, config.seed)
    optimizer = build_optimizer(model, config.optim)
    plain = Llama(config.model)
    plain.init_weights(config.seed)
    groups = {True: [], False: []}
    for name, parameter in plain.named_parameters():
        groups[name.endswith("norm.weight")].append(parameter)
    adam = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False]}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True,
    )  # fmt: skip
    loader = make_loader(config)
    cos, sin = plain.rope_cos[None, None, :12], plain.rope_sin[None, None, :12]
    plan = plan_of(config)
    assert plan.exit_weights == {3: 1.0}
    for t in range(4):
        batch = batch_at(loader, t)
        train_step(model, optimizer, batch, plan, t, config=config.step_config, runtime=runtime)
        for microbatch in batch:
            x = plain.tok_embeddings(microbatch.tokens)
            for block in plain.layers.values():
                x = block(x, cos, sin)
            exit_tokens = ExitTokens(plain.norm(x), microbatch.labels, 1.0)
            loss, _ = weighted_cross_entropy_sums([exit_tokens], plain.lm_head.weight, chunk_rows=7)
            (loss / 96).backward()
        for group in adam.param_groups:
            group["lr"] = lr(config.optim, t, config.steps)
        adam.step()
        adam.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs), name


def test_without_dropout_and_exits_training_is_a_plain_trainer_bit_for_bit():
    run_distributed(check_plain, 1)


def test_dropout_keys_follow_the_granularity():
    samples = np.array([6, 7])
    assert dropout_keys(LayerDropoutConfig(), samples, 1).tolist() == [6, 7]
    per_batch = LayerDropoutConfig(granularity="per_batch")
    assert dropout_keys(per_batch, samples, 1).tolist() == [1, 1]
    same = LayerDropoutConfig(same_rows_on_every_rank=True)
    assert dropout_keys(same, samples, 1).tolist() == [2, 3]
