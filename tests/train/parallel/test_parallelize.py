"""However a model is spread, checkpointed and compiled, it is trained as by one plain process."""

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import LlamaConfig
from models.layer_dropout import draw_kept_rows, uniform
from models.llama import Llama
from tests.batches import batch_at
from tests.distributed import ROOT, run_distributed, whole
from tests.train.loop.test_step import CollectiveCounter, make_config, make_loader
from train.decoding.continuation import continue_greedily
from train.loop.layerskip import LayerSkipSchedule
from train.loop.step import accumulate_gradients, train_step
from train.optimizer.optim import OptimConfig, build_optimizer, lr
from train.parallel.blocks import (
    checkpoint_blocks,
    compile_blocks,
    convert_blocks_to_float8,
    float8_problems,
)
from train.parallel.parallelize import ParallelConfig, build_model

STEPS = (3, 4, 5)
# Adam divides by |g| + eps: with an eps well above rounding errors those stay as small in the
# weights. The norm is above 0.3 in each of the steps (asserted below), so that clipping acts.
OPTIM = OptimConfig(lr=3e-2, eps=1e-3, warmup_steps=0, max_grad_norm=0.3)
CONFIG = make_config(optim=OPTIM, microbatch_size=2)
TINY = CONFIG.model


def schedule_of(config):
    return LayerSkipSchedule(
        layer_dropout=config.layer_dropout,
        curriculum=config.curriculum,
        early_exit=config.early_exit,
        L=config.model.n_layers,
        T=config.steps,
    )


def train_and_read(model, config, runtime):
    """Return the gradient at the first of STEPS, and the weights after them all."""
    optimizer = build_optimizer(model, config.optim)
    loader = make_loader(config, runtime.rank, runtime.world_size)
    plan = schedule_of(config).at
    keywords = dict(config=config.step_config, runtime=runtime)
    first = STEPS[0]
    accumulate_gradients(model, batch_at(loader, first), plan(first), first, **keywords)
    gradient = {name: whole(p.grad) for name, p in model.named_parameters()}
    optimizer.zero_grad()
    for t in STEPS:
        train_step(model, optimizer, batch_at(loader, t), plan(t), t, **keywords)
        decode(model, runtime.rank)
    return gradient, {name: whole(p) for name, p in model.named_parameters()}


def decode(model, rank=0):
    """Return what the exits predict along two continuations, other ones on every rank."""
    prompts = [[rank + 1, 7, 3], [5 + rank]]
    return continue_greedily(model, prompts, [4, 2], 4, torch.device("cpu"))


def slow_loss(model, config, t):
    """Return J of step t, sample by sample and layer by layer, with torch's own cross entropy."""
    plan = schedule_of(config).at(t)
    seq_len = config.data.seq_len
    cos, sin = model.rope_cos[None, None, :seq_len], model.rope_sin[None, None, :seq_len]
    one_by_one = dataclasses.replace(
        config, data=dataclasses.replace(config.data, microbatch_size=1)
    )
    J = 0.0
    for sample in batch_at(make_loader(one_by_one), t):
        draws = uniform(config.seed, t, 4, sample.samples.numpy())[:, 0]
        x = model.embed(sample.tokens)
        for l in range(4):
            if draws[l] >= plan.drop_prob[l]:
                out = model.layers[str(l)](x, cos, sin)
                x = x + (out - x) / (1 - plan.drop_prob[l])
            if l in plan.exit_layers:
                logits = model.exit_logits(x)[0]
                token_losses = F.cross_entropy(logits, sample.labels[0], reduction="sum")
                J = J + plan.exit_weights[l] * token_losses / config.data.tokens_per_step
    return J


def slow_training(config):
    """Return what `train_and_read` does, with AdamW and clipping written out."""
    model = Llama(config.model)
    model.init_weights(config.seed)
    parameters = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    m = {name: torch.zeros_like(p) for name, p in parameters.items()}
    v = {name: torch.zeros_like(p) for name, p in parameters.items()}
    (b1, b2), eps, decay = config.optim.betas, config.optim.eps, config.optim.weight_decay
    first_gradient = None
    for n, t in enumerate(STEPS, start=1):
        model.zero_grad()
        slow_loss(model, config, t).backward()
        gradient = {name: p.grad.clone() for name, p in parameters.items()}
        first_gradient = first_gradient or gradient
        norm = sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
        assert norm > config.optim.max_grad_norm
        step = lr(config.optim, t, config.steps)
        for name, p in parameters.items():
            g = gradient[name] * (config.optim.max_grad_norm / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            update = (m[name] / (1 - b1**n)) / ((v[name] / (1 - b2**n)).sqrt() + eps)
            with torch.no_grad():
                p -= step * (update + (0.0 if name.endswith("norm.weight") else decay) * p)
    weights = {name: p.detach() for name, p in parameters.items()}
    assert all((weights[name] - start[name]).abs().max() > 1e-3 for name in weights)
    return first_gradient, weights


def check_training(runtime, cases: list[ParallelConfig], microbatch_size=2, backend=None):
    """Compare every case with the slow form; `backend` compiles instead of inductor."""
    if backend is not None:
        compile_with(backend)
    config = make_config(optim=OPTIM, microbatch_size=microbatch_size)
    slow_gradient, slow_weights = slow_training(config)
    for parallel in cases:
        torch._dynamo.reset()
        case = dataclasses.replace(config, parallel=parallel)
        case.check(runtime.world_size)
        model = build_model(case.model, parallel, runtime, case.seed)
        gradient, weights = train_and_read(model, case, runtime)
        for ours, theirs in ((gradient, slow_gradient), (weights, slow_weights)):
            assert list(ours) == list(theirs)
            for name in ours:
                error = (ours[name] - theirs[name]).abs().max().item()
                assert error <= 1e-6, (parallel, name, error)
        plain = Llama(case.model)
        plain.load_state_dict(weights)
        assert torch.equal(decode(model, runtime.rank), decode(plain, runtime.rank)), parallel


def compile_with(backend):
    """Compile with another backend than inductor, in this process."""
    compile_function = torch.compile
    torch.compile = lambda function, **options: compile_function(
        function, backend=backend, **options
    )


MODES = ("none", "full", "selective")


def spread(dp_replicate, **fields):
    return [
        ParallelConfig(
            shard="blocks", dp_replicate=dp_replicate, activation_checkpointing=mode, **fields
        )
        for mode in MODES
    ]


def test_training_on_one_rank_equals_the_slow_form():
    cases = [
        *spread(1),
        ParallelConfig(shard="blocks", cpu_offload=True),
        ParallelConfig(),
        ParallelConfig(activation_checkpointing="full"),
    ]
    run_distributed(check_training, 1, cases)


def test_training_sharded_and_whole_on_two_ranks_equals_the_slow_form():
    cases = [
        *spread(1),
        *spread(2),
        ParallelConfig(shard="blocks", reduce_every_microbatch=True),
        ParallelConfig(shard="blocks", dp_replicate=2, reduce_every_microbatch=True),
        ParallelConfig(shard="blocks", cpu_offload=True, reduce_every_microbatch=True),
        ParallelConfig(shard="blocks", cpu_offload=True, activation_checkpointing="full"),
        ParallelConfig(),
        ParallelConfig(shard="none", activation_checkpointing="selective"),
    ]
    run_distributed(check_training, 2, cases)


def test_training_hybrid_on_four_ranks_equals_the_slow_form():
    cases = [
        *spread(2),
        ParallelConfig(shard="blocks", dp_replicate=2, reduce_every_microbatch=True),
    ]
    run_distributed(check_training, 4, cases, 1)


def test_training_compiled_on_two_ranks_equals_the_slow_form():
    cases = [ParallelConfig(shard="blocks", compile=True, activation_checkpointing="full")]
    run_distributed(check_training, 2, cases, 2, "aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("ranks", "dp_replicate"), [(2, 1), (2, 2), (4, 2)])
def test_training_compiled_however_spread_equals_the_slow_form(ranks, dp_replicate):
    cases = spread(dp_replicate, compile=True)
    run_distributed(check_training, ranks, cases, 4 // ranks, "aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_compiled_by_inductor_equals_the_slow_form():
    run_distributed(check_training, 2, [ParallelConfig(shard="blocks", compile=True)])


LARGE = dataclasses.replace(TINY, vocab_size=2**22)  # 2.1 GiB of weights, gradients and moments


@pytest.mark.parametrize(
    ("model", "ranks", "fields", "on_gpu", "shard"),
    [
        (TINY, 1, {}, False, "none"),
        (TINY, 2, {}, False, "none"),
        (TINY, 4, {"dp_replicate": 2}, False, "blocks"),
        (TINY, 2, {"cpu_offload": True}, False, "blocks"),
        (TINY, 2, {"reduce_dtype": "bfloat16"}, False, "blocks"),
        (TINY, 2, {}, True, "blocks"),  # in bfloat16
        (TINY, 2, {"param_dtype": "float32"}, True, "none"),
        (LARGE, 2, {}, False, "blocks"),
        (LARGE, 2, {"dp_replicate": 2}, False, "none"),
        (LARGE, 1, {}, False, "none"),
        (LARGE, 2, {"shard": "none"}, True, "none"),
        (TINY, 2, {"shard": "blocks"}, False, "blocks"),
    ],
)
def test_models_are_sharded_where_that_saves_memory_or_is_needed(
    model, ranks, fields, on_gpu, shard
):
    config = ParallelConfig(**fields)
    assert config.problems(ranks) == []
    settled = config.settled(model, ranks, on_gpu=on_gpu)
    assert settled.shard == shard
    assert settled.param_dtype == ("bfloat16" if on_gpu and shard == "blocks" else "float32")
    assert settled.settled(model, ranks, on_gpu=on_gpu) == settled


def test_settings_that_plain_weights_do_not_have_are_named():
    for field, value in (("float8", True), ("cpu_offload", True), ("param_dtype", "bfloat16")):
        first, *_ = ParallelConfig(shard="none", **{field: value}).problems(2)
        assert first.startswith(f"parallel.shard: none does not go with parallel.{field}")


def count_communication(runtime):
    for parallel, gathers, reduces, sums in (
        # Two microbatches; 4 blocks, gathered for forward and backward; the root, once a step.
        # The tokens that have a loss are counted once.
        (ParallelConfig(shard="blocks"), 17, 5, 1),
        (ParallelConfig(shard="blocks", reduce_every_microbatch=True), 17, 10, 1),
        # ZeRO-2 gathers once a step.
        (ParallelConfig(shard="blocks", reshard_after_forward=False), 5, 5, 1),
        # Whole on every rank: nothing is gathered, and the gradients are summed once a step.
        (ParallelConfig(), 0, 0, 2),
        (ParallelConfig(shard="blocks", dp_replicate=2), 0, 0, 6),
        (ParallelConfig(shard="blocks", dp_replicate=2, reduce_every_microbatch=True), 0, 0, 6),
    ):
        config = dataclasses.replace(CONFIG, parallel=parallel)
        model = build_model(config.model, parallel, runtime, config.seed)
        batch = batch_at(make_loader(config, runtime.rank, runtime.world_size), 3)
        assert len(batch) == 2
        with CollectiveCounter() as counter:
            accumulate_gradients(
                model,
                batch,
                schedule_of(config).at(3),
                3,
                config=config.step_config,
                runtime=runtime,
            )
        seen = {
            kind: sum(n for name, n in counter.counts.items() if kind in name)
            for kind in ("gather", "reduce_scatter", "allreduce")
        }
        expected = {"gather": gathers, "reduce_scatter": reduces, "allreduce": sums}
        assert seen == expected, (parallel, counter.counts)


def test_gradients_are_reduced_once_a_step_or_every_microbatch_as_configured():
    run_distributed(count_communication, 2)


def check_names_and_weights(runtime):
    plain = Llama(TINY)
    plain.init_weights(seed=3)
    for parallel in (
        *spread(1),
        ParallelConfig(),
        ParallelConfig(shard="blocks", compile=True),
        ParallelConfig(shard="blocks", cpu_offload=True),
    ):
        model = build_model(TINY, parallel, runtime, seed=3)
        assert list(model.state_dict()) == list(plain.state_dict())
        for (name, ours), (other, theirs) in zip(
            model.named_parameters(), plain.named_parameters(), strict=True
        ):
            assert name == other
            assert torch.equal(whole(ours), theirs), (name, parallel)
        assert torch.equal(model.rope_cos, plain.rope_cos)


def test_names_and_initial_weights_do_not_depend_on_how_blocks_compute():
    run_distributed(check_names_and_weights, 1)


class OperatorCounter(TorchDispatchMode):
    """Counts attentions and matrix products."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function.overloadpacket)
        self.counts["attention"] += "attention" in name and "backward" not in name
        self.counts["product"] += name == "aten.mm"
        return function(*arguments, **(keywords or {}))


def test_checkpointing_computes_again_what_it_should():
    again = {}
    for mode in MODES:
        model = Llama(TINY)
        model.init_weights(seed=0)
        if mode != "none":
            checkpoint_blocks(model, mode)
        x = model(torch.zeros(2, 8, dtype=torch.int64), exit_layers=[3]).exits[3]
        with OperatorCounter() as counter:
            x.sum().backward()
        again[mode] = counter.counts
    # 4 blocks of 7 products, each with two in its backward.
    assert again["none"] == {"attention": 0, "product": 56}
    assert again["full"] == {"attention": 4, "product": 56 + 28}
    # Every second product is kept. So is attention on GPUs; torchtitan's list has none of CPUs.
    assert again["selective"] == {"attention": 4, "product": 56 + 12}


class Backend:
    """Runs graphs as they are, and counts them and the sizes that may differ in one of them."""

    def __init__(self):
        self.graphs = self.most_sizes = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        sizes = {str(each) for each in inputs if isinstance(each, torch.SymInt)}
        self.most_sizes = max(self.most_sizes, sum(not each.isdigit() for each in sizes))
        return graph.forward


def run_changing_rows(model, steps, **keywords):
    """Train with stochastic depth, whose rows change from layer to layer, and validate."""
    seen = set()
    for t in steps:
        # Uniform over depth, so that the whole batch need not come first; the scale changes too.
        kept = draw_kept_rows(
            [0.3 + t / 200, 0.3, 0.6, 0.9], seed=0, t=t, keys=np.arange(6), scale_kept=True,
            device=torch.device("cpu"),
        )  # fmt: skip
        seen |= {6 if choice.rows is None else len(choice.rows) for choice in kept.choices}
        tokens = torch.zeros(6, 12, dtype=torch.int64)
        hidden = model(tokens, exit_layers=[1, 3], kept_rows=kept, **keywords).exits
        sum(h.sum() for h in hidden.values()).backward()
        if t % 4 == 3:
            with torch.no_grad():
                model(tokens, exit_layers=range(4), documents=keywords.get("documents"))
            decode(model)
    return seen


def check_number_of_graphs(runtime):
    backend = Backend()
    compile_with(backend)
    documents = {"documents": torch.arange(12).expand(6, 12) // 5}
    routed = dataclasses.replace(TINY, router="linear")
    cases = [(mode, TINY, {}) for mode in MODES]
    cases += [("none", TINY, documents), ("full", routed, documents | {"capacity": 0.5})]
    for mode, config, keywords in cases:
        torch._dynamo.reset()
        backend.graphs = 0
        parallel = ParallelConfig(shard="blocks", compile=True, activation_checkpointing=mode)
        model = build_model(config, parallel, runtime, seed=0)
        assert run_changing_rows(model, range(12), **keywords) == {0, 1, 2, 3, 4, 5, 6}
        # In training the first number of rows, any other, one; in validation all rows, or any. The
        # same for each of the four layers.
        first = backend.graphs
        assert 3 <= first <= 5, (mode, keywords, first)
        assert backend.most_sizes == 1, "the length of a row is dynamic too"
        run_changing_rows(model, range(12, 40), **keywords)
        assert backend.graphs == first, (mode, keywords, first)


def test_all_numbers_of_rows_and_layers_share_the_same_few_graphs():
    run_distributed(check_number_of_graphs, 1)


def check_recompile_limit(runtime):
    compile_with(Backend())
    model = build_model(TINY, ParallelConfig(shard="blocks", compile=True), runtime, seed=0)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        run_changing_rows(model, range(12))


def test_a_block_never_falls_back_to_uncompiled_in_silence():
    run_distributed(check_recompile_limit, 1)


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nwas found")

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile_function(f, backend=broken, **o))
    model = Llama(TINY)
    compile_blocks(model)
    with pytest.raises(ValueError, match=r"^parallel\.compile: .*, set it to False, or .*$"):
        model(torch.zeros(2, 8, dtype=torch.int64), exit_layers=[3])


def test_the_compiler_is_imported_only_when_used():
    code = (
        "import sys, train.parallel.parallelize;"
        "names = ('torchtitan.distributed.activation_checkpoint', 'torchao', 'torch._dynamo');"
        "assert not [name for name in names if name in sys.modules]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_replicas_that_do_not_divide_the_ranks_are_refused():
    (problem,) = ParallelConfig(shard="blocks", dp_replicate=3).problems(4)
    assert problem.startswith("parallel.dp_replicate: 3 does not divide the 4 ranks")
    assert ParallelConfig(shard="blocks", dp_replicate=4).problems(4) == []


WIDE = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=53, max_seq_len=16
)


def test_float8_without_torchao_is_refused(monkeypatch):
    monkeypatch.setattr("train.parallel.parallelize.find_spec", lambda name: None)
    (problem,) = ParallelConfig(shard="blocks", float8=True).problems(1)
    assert problem == "parallel.float8: torchao is not installed, pip install -e .[float8]"
    assert ParallelConfig(shard="blocks").problems(1) == []


def test_float8_refuses_widths_that_are_no_multiple_of_16():
    assert float8_problems(WIDE) == []
    odd = dataclasses.replace(WIDE, ffn_dim=40, n_kv_heads=1, dim=72, n_heads=6)
    assert [problem.split(":")[0] for problem in float8_problems(odd)] == [
        "model.dim", "model.ffn_dim", "model.n_kv_heads * head_dim"
    ]  # fmt: skip
    [problem, _] = float8_problems(dataclasses.replace(WIDE, head_dim=14))
    assert problem.startswith("model.n_heads * head_dim: 56, parallel.float8 needs a multiple")


def test_float8_refuses_a_device_without_it(monkeypatch):
    with torch.device("meta"):
        model = Llama(WIDE)
    with pytest.raises(ValueError, match="parallel.float8: cpu has no float8 units"):
        convert_blocks_to_float8(model, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="parallel.float8: cuda has no float8 units"):
        convert_blocks_to_float8(model, torch.device("cuda"))


def test_float8_takes_the_matrices_of_the_blocks_and_not_the_head(monkeypatch):
    float8 = pytest.importorskip("torchao.float8")
    make = float8.Float8LinearConfig
    monkeypatch.setattr(float8, "Float8LinearConfig", lambda **fields: make(emulate=True, **fields))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plain, model = Llama(WIDE), Llama(WIDE)
    convert_blocks_to_float8(model, torch.device("cuda"))
    kinds = Counter(type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear))
    assert kinds == {"Float8Linear": 14, "Linear": 1}
    assert type(model.lm_head) is nn.Linear
    for each in (plain, model):
        each.init_weights(seed=0)
    tokens = torch.arange(32).view(2, 16)
    ours, exact = (each(tokens, exit_layers=[1]).exits[1] for each in (model, plain))
    error = ((ours - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.2  # three bits of mantissa


def train_in_float8(runtime):
    losses = {}
    for float8 in (False, True):
        config = make_config(model=WIDE, parallel=ParallelConfig(shard="blocks", float8=float8))
        model = build_model(WIDE, config.parallel, runtime, config.seed)
        batch = batch_at(make_loader(config), 5)
        plan = dataclasses.replace(schedule_of(config).at(5), exit_layers=(1,))
        plan = dataclasses.replace(plan, exit_weights={1: 1.0}, drop_prob=(0.0, 0.9))
        totals = accumulate_gradients(
            model, batch, plan, 5, config=config.step_config, runtime=runtime
        )
        losses[float8] = totals.J.item()
        assert all(p.grad.full_tensor().isfinite().all() for p in model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True] != losses[False]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with float8",
)
def test_training_in_float8_on_a_gpu_is_near_training_without():
    pytest.importorskip("torchao.float8")
    run_distributed(train_in_float8, 1)


def train_offloaded(runtime):
    parallel = ParallelConfig(shard="blocks", cpu_offload=True, param_dtype="float32")
    config = dataclasses.replace(CONFIG, parallel=parallel)
    model = build_model(config.model, parallel, runtime, config.seed)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.rope_cos.device == runtime.device
    before = [p.full_tensor().clone() for p in model.parameters()]
    gradient, weights = train_and_read(model, config, runtime)
    for start, now in zip(before, weights.values(), strict=True):
        assert now.isfinite().all()
        assert not torch.equal(now.cpu(), start.cpu())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_weights_live_on_the_host_and_learn():
    run_distributed(train_offloaded, 1)
