"""The planned memory of a tiny model equals what torch's own allocator counts in a real step."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from data.loader import Microbatch
from loss.early_exit import EarlyExitConfig
from loss.state_distillation import state_pairs
from models.config import LlamaConfig
from models.flops import total_params
from models.layer_dropout import LayerDropoutConfig
from tests.distributed import run_distributed
from train.loop.layerskip import StepPlan
from train.loop.step import StepConfig, train_step
from train.optimizer.optim import OptimConfig, build_optimizer
from train.parallel.parallelize import ParallelConfig, build_model
from train.planning.memory import Work, measure

MODEL = LlamaConfig(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=320, vocab_size=1000, max_seq_len=256
)
ROOT_BYTES = 4 * (2 * 1000 * 128 + 128)
ALL_BYTES = ROOT_BYTES + 4 * 4 * (2 * 128 * 32 * (4 + 2) + 3 * 128 * 320 + 2 * 128)


def make_work(ranks=1, model=MODEL, *, microbatches=2, losses=None, optim="adamw", **parallel):
    L, losses = model.n_layers, losses or {}
    early_exit = EarlyExitConfig(chunk_rows=256, exits=(2, 3), **losses)
    return Work(
        model=model,
        parallel=ParallelConfig(**{"shard": "blocks"} | parallel),
        step=StepConfig(
            seed=0,
            T=10,
            optim=OptimConfig(lr=1e-3, name=optim),
            layer_dropout=LayerDropoutConfig(),
            early_exit=early_exit,
        ),
        plan=StepPlan(
            (0.0,) * L,
            (1, 2, L - 1),
            {1: 0.2, 2: 0.3, L - 1: 0.5},
            token_fraction=early_exit.token_fraction,
            state_pairs=state_pairs(L, 3, early_exit.distill_states),
        ),
        rows=4,
        seq_len=256,
        microbatches=microbatches,
        ranks=ranks,
    )


class Allocator:
    """The balance of torch's CPU allocator over a `with` block, from its own events."""

    def __enter__(self):
        gc.collect()  # or what came before would be freed in this one's time
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception):
        self.profiler.__exit__(*exception)
        events = self.profiler.profiler.kineto_results.events()
        self.balance = self.highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                self.balance += event.nbytes()
                self.highest = max(self.highest, self.balance)


def local_bytes(tensors):
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def compare(runtime, work, planned):
    """Train two steps in earnest and hold every figure of the plan against them."""
    gradients = []
    tokens = torch.zeros(work.rows, work.seq_len, dtype=torch.int64)
    batches = [Microbatch(tokens, tokens, torch.arange(work.rows))] * work.microbatches
    with Allocator() as allocator:
        model = build_model(work.model, work.parallel, runtime, seed=0)
        optimizer = build_optimizer(model, work.step.optim)
        next(iter(optimizer)).register_step_pre_hook(
            lambda *_: gradients.append(local_bytes(p.grad for p in model.parameters()))
        )
        for t in range(2):
            train_step(model, optimizer, batches, work.plan, t, config=work.step, runtime=runtime)
    state = local_bytes([*model.parameters(), *model.buffers()])
    with Allocator() as forward:
        hidden = model(tokens, exit_layers=work.plan.hidden_layers).exits
    moments = [v for v in optimizer.state_dict().values() if isinstance(v, torch.Tensor)]
    parts, highest = planned.device.parts, planned.device.highest
    near = {"rel": 0.001}
    assert parts["parameters"] == state
    assert parts["moments"] == pytest.approx(local_bytes(moments), **near)
    assert highest["gradients"] == pytest.approx(gradients[-1], **near)
    alone = work.parallel.shard == "none" and work.ranks == 1  # then nothing is summed
    waiting = 0 if alone else 4 * total_params(work.model)
    assert highest["unreduced gradients"] == pytest.approx(waiting, abs=100, **near)
    if work.parallel.activation_checkpointing == "none":  # else there is more in the backward pass
        activations = forward.balance - ROOT_BYTES  # the root's weights stay gathered
        assert highest["activations"] == pytest.approx(activations, rel=0.1)
    # gloo holds on to copies of what it sends; alone, the two agree but for scalars.
    assert planned.device.total == pytest.approx(
        allocator.highest, rel=0.1 if runtime.world_size > 1 else 0.001
    )
    del hidden


def compare_all(runtime, pairs):
    for work, planned in pairs:
        compare(runtime, work, planned)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_agrees_with_the_allocator_within_a_tenth(ranks):
    works = [make_work(ranks, activation_checkpointing=mode) for mode in ("none", "selective")]
    works.append(make_work(ranks, optim="muon"))
    works.append(make_work(ranks, shard="none"))
    run_distributed(compare_all, ranks, [(work, measure(work, on_gpu=False)) for work in works])


LOSSES = [
    {"z_loss": 1e-4, "confidence_weights": True},
    {"token_fraction": 0.25, "distill": 0.5},
    {"distill_states": "last"},
    {"distill_states": "uniform"},
    {"distill_states": "dynamic", "z_loss": 1e-4, "confidence_weights": True, "distill": 0.5},
]


def test_the_plan_agrees_with_the_allocator_for_every_loss_and_for_no_llama():
    works = [make_work(losses=losses) for losses in LOSSES]
    other = {"head_dim": 48, "qk_norm": "head", "attention_bias": "qkv", "sliding_window": 64}
    works.append(make_work(model=replace(MODEL, **other)))
    run_distributed(compare_all, 1, [(work, measure(work, on_gpu=False)) for work in works])


def test_a_distilled_state_is_kept_as_an_exits_is_and_a_share_of_tokens_costs_less():
    def highest(exit_layers=(1, 2, 3), **losses):
        work = make_work(losses=losses)
        weights = dict.fromkeys(exit_layers, 0.3)
        plan = replace(work.plan, exit_layers=exit_layers, exit_weights=weights)
        return measure(replace(work, plan=plan), on_gpu=True).device.highest

    # Students are layers 0 to 2, teachers 1 to 3: layer 0 has no exit of its own.
    distilled, plain = highest(distill_states="dynamic"), highest()
    assert distilled["activations"] == highest((0, 1, 2, 3))["activations"] > plain["activations"]
    assert highest(token_fraction=0.25)["loss and head"] < plain["loss and head"]


def test_full_checkpointing_keeps_the_input_of_each_block_and_one_block():
    def activations(L, mode):
        model = replace(MODEL, n_layers=L)
        need = measure(make_work(model=model, activation_checkpointing=mode), on_gpu=False)
        return need.device.highest["activations"]

    one_input = 4 * 256 * 128 * 4  # rows, seq, dim, fp32
    assert activations(5, "full") - activations(4, "full") == pytest.approx(one_input, rel=1e-4)
    assert activations(4, "full") < activations(4, "none") / 2


def test_a_layer_on_a_gpu_keeps_what_its_kernels_need():
    def activations(L):
        model = replace(MODEL, n_layers=L, n_kv_heads=4)
        return measure(make_work(model=model), on_gpu=True).device.highest["activations"]

    # bfloat16: inputs and outputs of both norms, q, k, v and what attention gives are dim wide; of
    # ffn_dim what w1, silu, w3 and the product give. fp32: a number per row of each norm and head.
    per_token = 2 * (8 * 128 + 4 * 320) + 4 * (2 + 4)
    assert activations(5) - activations(4) == pytest.approx(4 * 256 * per_token, rel=1e-4)


def test_on_gpus_too_checkpointing_keeps_less():
    def activations(mode):
        work = make_work(param_dtype="bfloat16", activation_checkpointing=mode)
        return measure(work, on_gpu=True).device.highest["activations"]

    assert activations("full") < activations("selective") < activations("none")


def test_gradients_wait_unreduced_only_where_microbatches_accumulate():
    alone, accumulated = (
        measure(make_work(8, microbatches=n), on_gpu=True).device.highest for n in (1, 3)
    )
    assert alone["unreduced gradients"] == 0
    assert accumulated["unreduced gradients"] == pytest.approx(ALL_BYTES, rel=0.001)
    assert accumulated["gradients"] == pytest.approx(ALL_BYTES / 8, rel=0.001)


def test_copies_hold_the_whole_model_and_shards_their_part():
    sharded, copied = (
        measure(make_work(8, dp_replicate=n, microbatches=1), on_gpu=True).device.parts
        for n in (1, 8)
    )
    for part in ("parameters", "moments"):
        tables = 2 * 256 * 32 * 4 if part == "parameters" else 0  # rotary, on every rank
        whole = copied[part] - tables
        assert whole == pytest.approx(ALL_BYTES * (2 if part == "moments" else 1), rel=0.001)
        assert sharded[part] - tables == pytest.approx(whole / 8, rel=0.001)


def test_muon_keeps_one_moment_of_the_blocks_matrices_and_needs_few_matrices_at_once():
    adamw, muon = (
        measure(make_work(4, microbatches=1, optim=name), on_gpu=True) for name in ("adamw", "muon")
    )
    blocks = ALL_BYTES - ROOT_BYTES
    assert adamw.device.parts["moments"] == pytest.approx(2 * ALL_BYTES / 4, rel=0.001)
    less = adamw.device.parts["moments"] - muon.device.parts["moments"]
    assert less == pytest.approx(blocks / 4, rel=0.01)  # norms keep two
    assert adamw.device.highest["update"] < 1000
    # The largest matrix, 320 x 128: parts and whole in bfloat16, its iterates, a part in fp32.
    assert 320 * 128 * 2 * 2 < muon.device.highest["update"] < 320 * 128 * 2 * 10
    # Each matrix goes to one rank and back, in bfloat16. Four ranks take four at a time.
    moved = muon.collective_bytes
    assert sum(n for name, n in moved.items() if "alltoall" in name) == pytest.approx(
        2 * blocks / 4 / 2, rel=0.05
    )
    assert not any("alltoall" in name for name in adamw.collective_bytes)


def test_offload_moves_parameters_gradients_and_moments_to_the_host():
    device, host = (
        measure(make_work(4, microbatches=1, cpu_offload=offload), on_gpu=True)
        for offload in (False, True)
    )
    assert device.host_bytes == 0
    assert host.host_bytes == pytest.approx(ALL_BYTES, rel=0.1)  # four of fp32, on four ranks
    assert host.device.highest["activations"] == device.device.highest["activations"]
    assert host.device.parts["parameters"] == 0


@pytest.mark.parametrize(("microbatches", "zero3"), [(1, True), (2, True), (5, True), (5, False)])
def test_blocks_are_gathered_twice_a_microbatch_or_once_and_the_rest_once(microbatches, zero3):
    work = make_work(8, microbatches=microbatches, reshard_after_forward=zero3)
    step = replace(work.step, reshard_after_forward=zero3)
    moved = measure(replace(work, step=step), on_gpu=True).collective_bytes
    gathered = sum(v for k, v in moved.items() if "allgather" in k)
    reduced = sum(v for k, v in moved.items() if "reduce_scatter" in k)
    blocks = ALL_BYTES - ROOT_BYTES
    passes = 2 * microbatches if zero3 else 1
    assert gathered == pytest.approx((passes * blocks + ROOT_BYTES) / 2, rel=0.001)
    assert reduced == pytest.approx(ALL_BYTES, rel=0.001)
