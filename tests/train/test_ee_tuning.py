"""Exits of their own learn as a plain process would have them, and a frozen backbone not a bit."""

import dataclasses
import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from loss.curriculum import CurriculumConfig
from loss.early_exit import EarlyExitConfig
from models.checkpoint_format import find_checkpoint, load_model
from models.flops import own_exit_params
from models.layer_dropout import LayerDropoutConfig
from models.llama import Llama
from tests.batches import batch_at
from tests.distributed import like, run_distributed, whole
from tests.models.test_exit_parts import shake
from tests.train import tiny
from tests.train.loop.test_step import make_config, make_loader
from tests.train.planning.test_memory import MODEL as MEMORY_MODEL
from tests.train.planning.test_memory import local_bytes, make_work
from tests.train.test_main import records
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.checkpointer import CheckpointWriter
from train.checkpoints.content import RunIdentity, checkpoint_bytes
from train.checkpoints.resume import resume
from train.checkpoints.start import load_initial_weights
from train.loop.layerskip import StepPlan
from train.loop.step import accumulate_gradients, train_step
from train.optimizer.optim import OptimConfig, build_optimizer, lr
from train.parallel.parallelize import ParallelConfig, build_model, freeze
from train.parallel.runtime import RuntimeConfig, start_runtime
from train.planning.memory import measure

EXITS, WEIGHTS = (2, 3), (0.5, 0.75)
STEPS = (2, 3, 4, 5)


def config_of(trains, *, mlp=True, curriculum="all", distill=0.0, parallel=None, **changes):
    plain = make_config(**changes)
    return replace(
        plain,
        model=replace(plain.model, own_exits=EXITS, own_exit_mlp=mlp),
        optim=OptimConfig(lr=3e-2, eps=1e-3, warmup_steps=0, max_grad_norm=0.05, trains=trains),
        layer_dropout=LayerDropoutConfig(),
        curriculum=CurriculumConfig(C=curriculum, R=2),
        early_exit=EarlyExitConfig(
            weights="fixed", exits=EXITS, exit_weights=WEIGHTS, chunk_rows=7, distill=distill
        ),
        parallel=parallel or ParallelConfig(shard="blocks"),
        checkpoint=CheckpointConfig(init_from="somewhere"),
    )


def build(config, runtime):
    """Return a sharded model whose exits' parts are not what they begin as."""
    model = build_model(
        config.model, config.parallel, runtime, config.seed, trains=config.optim.trains
    )
    values = dict(slow_model(config).named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("own_exits."):
            parameter.data.copy_(like(parameter, values[name].detach()))
    return model


def slow_model(config):
    model = Llama(config.model)
    model.init_weights(config.seed)
    shake(model)
    return model


def slow_weights(config, t):
    """Return {E: weight} of the losses that anything learns from, worked out by hand."""
    weights = dict(zip(EXITS, WEIGHTS, strict=True))
    if config.curriculum.C == "rot":  # R = 2: l = 0 and 2 in even steps, l = 1 in odd ones
        weights = {E: w for E, w in weights.items() if t % 2 == (E - 1) % 2}
    return weights if config.optim.trains == "exits" else weights | {4: 1.0}


def slow_loss(model, config, t):
    """Return J of step t with torch's own cross entropy and divergence."""
    J, rows = 0.0, 0
    for batch in batch_at(make_loader(config), t):
        _, states = model.run_layers(model.embed(batch.tokens), 0, 4, exit_layers=range(4))
        labels = batch.labels.flatten()
        teacher = model.exit_logits(states[3]).flatten(0, 1).detach().softmax(-1)
        for E, weight in slow_weights(config, t).items():
            logits = model.exit_logits(states[E - 1], E).flatten(0, 1)
            share = config.early_exit.distill if E < 4 else 0.0
            loss = (1 - share) * F.cross_entropy(logits, labels, reduction="sum")
            if share:
                divergence = F.kl_div(logits.log_softmax(-1), teacher, reduction="sum")
                loss = loss + share * divergence
            J = J + weight * loss
        rows += len(labels)
    return J / rows


def check_gradients(runtime, configs):
    for config in configs:
        config.check(runtime.world_size)
        model, slow = build(config, runtime), slow_model(config)
        t = STEPS[0]
        batch = batch_at(make_loader(config, runtime.rank, runtime.world_size), t)
        keywords = {"config": config.step_config, "runtime": runtime}
        totals = accumulate_gradients(model, batch, config.layerskip.at(t), t, **keywords)
        slow_J = slow_loss(slow, config, t)
        slow_J.backward()
        if not config.early_exit.distill:  # the teacher's own loss is among those reported
            torch.testing.assert_close(runtime.sum_over_ranks(totals.J), slow_J.detach())
        for (name, ours), theirs in zip(model.named_parameters(), slow.parameters(), strict=True):
            own = name.startswith("own_exits.")
            assert ours.requires_grad == (own or config.optim.trains == "all"), name
            if not ours.requires_grad or theirs.grad is None:
                assert ours.grad is None, name
                continue
            grad = whole(ours.grad)
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(grad, theirs.grad, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_an_unsharded_reference_and_flow_where_they_should(ranks):
    configs = [
        config_of(trains, mlp=mlp, microbatch_size=4 // ranks, parallel=parallel)
        for trains in ("all", "exits")
        for mlp in (False, True)
        for parallel in (
            ParallelConfig(shard="blocks", activation_checkpointing="full"),
            ParallelConfig(shard="blocks", dp_replicate=ranks, reduce_every_microbatch=True),
        )
    ]
    configs += [
        config_of("exits", parallel=ParallelConfig(shard="blocks", reshard_after_forward=False)),
        config_of("exits", parallel=ParallelConfig(shard="none")),
        config_of("exits", distill=0.4),
        config_of("exits", curriculum="rot"),
        config_of("exits", tie=True, mlp=False),
    ]
    run_distributed(check_gradients, ranks, configs)


def test_gradients_on_four_ranks_hybrid_equal_an_unsharded_reference():
    configs = [
        config_of(
            "exits",
            microbatch_size=1,
            parallel=ParallelConfig(shard="blocks", dp_replicate=2),
            mlp=mlp,
        )
        for mlp in (False, True)
    ]
    run_distributed(check_gradients, 4, configs)


def check_steps(runtime, configs):
    for config in configs:
        model, slow = build(config, runtime), slow_model(config)
        before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        optimizer = build_optimizer(model, config.optim)
        loader = make_loader(config, runtime.rank, runtime.world_size)
        if config.optim.trains == "exits":
            slow.requires_grad_(False)
            slow.own_exits.requires_grad_(True)
        learn = [(n, p) for n, p in slow.named_parameters() if p.requires_grad]
        norms = [p for n, p in learn if n.endswith("norm.weight")]
        others = [p for n, p in learn if not n.endswith("norm.weight")]
        groups = [{"params": norms, "weight_decay": 0.0}]
        groups += [{"params": others, "weight_decay": config.optim.weight_decay}] if others else []
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3)
        for t in STEPS:
            plan = config.layerskip.at(t)
            train_step(
                model,
                optimizer,
                batch_at(loader, t),
                plan,
                t,
                config=config.step_config,
                runtime=runtime,
            )
            slow_loss(slow, config, t).backward()
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in learn], 0.05)
            assert norm > 0.05, "clipping was to act"
            for group in adam.param_groups:
                group["lr"] = lr(config.optim, t, config.steps)
            adam.step()
            adam.zero_grad()
        for (name, ours), theirs in zip(model.named_parameters(), slow.parameters(), strict=True):
            after = ours.full_tensor()
            if ours.requires_grad:
                assert not torch.equal(after, before[name]), name
                torch.testing.assert_close(after, theirs, atol=2e-6, rtol=1e-5, msg=name)
            else:
                assert torch.equal(after, before[name]), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_with_exits_on_and_off_equal_a_plain_process_and_leave_the_rest_bit_for_bit(ranks):
    # R = 2: exit 3 is off in every second step, exit 2 in the others.
    configs = [
        config_of(trains, mlp=mlp, curriculum="rot", microbatch_size=4 // ranks, parallel=parallel)
        for trains, parallel in (
            ("exits", ParallelConfig(shard="blocks")),
            (
                "exits",
                ParallelConfig(
                    shard="blocks", dp_replicate=ranks, activation_checkpointing="selective"
                ),
            ),
            ("all", ParallelConfig(shard="blocks")),
        )
        for mlp in (False, True)
    ]
    run_distributed(check_steps, ranks, configs)


def check_half_precision(runtime, configs):
    """Accumulate, unreduced, where units are not called and never were."""
    for config in configs:
        config.check(runtime.world_size)
        model = build(config, runtime)
        optimizer = build_optimizer(model, config.optim)
        loader = make_loader(config, runtime.rank, runtime.world_size)
        for t in STEPS:
            plan, batch = config.layerskip.at(t), batch_at(loader, t)
            assert len(batch) > 1
            keywords = {"config": config.step_config, "runtime": runtime}
            totals = accumulate_gradients(model, batch, plan, t, **keywords)
            assert totals.J.isfinite()
            for name, parameter in model.named_parameters():
                part, number, *_ = name.split(".")
                on = parameter.requires_grad and (
                    (part == "own_exits" and int(number) - 1 in plan.exit_layers)
                    or (part == "layers" and int(number) <= max(plan.exit_layers))
                )
                if part in ("own_exits", "layers"):
                    assert (parameter.grad is not None) == on, (t, name)
            optimizer.zero_grad()


@pytest.mark.parametrize("ranks", [1, 2])
def test_units_that_are_not_called_work_in_half_precision(ranks):
    half = ParallelConfig(shard="blocks", param_dtype="bfloat16")
    hybrid = ParallelConfig(shard="blocks", param_dtype="bfloat16", dp_replicate=ranks)
    frozen = config_of("exits", curriculum="rot", microbatch_size=2, parallel=half)
    config = config_of("all", microbatch_size=2, parallel=hybrid)
    rotating = CurriculumConfig(C="rot", R=3, last_layer_always_on=False)
    everywhere = EarlyExitConfig(weights="uniform", chunk_rows=7)
    often_shallow = replace(config, curriculum=rotating, early_exit=everywhere)
    run_distributed(check_half_precision, ranks, [frozen, often_shallow])


def test_plans_hold_what_learns_and_who_teaches():
    assert config_of("all").layerskip.at(2).exit_layers == (1, 2, 3)
    plan = config_of("exits").layerskip.at(2)
    assert plan.exit_weights == {1: 0.5, 2: 0.75}
    assert plan.mean_layers == 3, "the last layer is not run"
    taught = config_of("exits", distill=0.5).layerskip
    assert taught.at(2).exit_layers == (1, 2, 3)
    assert (config_of("all").layerskip.monitored_layer, taught.monitored_layer) == (3, 2)


def test_a_forward_pass_ends_at_the_deepest_exit_that_is_wanted():
    model, ran = slow_model(config_of("all")), []
    for l, block in model.layers.items():
        block.register_forward_hook(lambda *_, l=l: ran.append(int(l)))
    model(torch.zeros(1, 3, dtype=torch.int64), exit_layers=[0, 2])
    assert ran == [0, 1, 2]


def identity_of(folder, config):
    return replace(tiny.identity(folder), model=config.model)


def check_resume(runtime, folder, mlp):
    config = config_of("exits", mlp=mlp, microbatch_size=2, curriculum="rot")
    loader = make_loader(config, runtime.rank, runtime.world_size)
    identity: RunIdentity = identity_of(folder, config)

    def begin():
        model = build(config, runtime)
        return model, build_optimizer(model, config.optim)

    def go_on(model, optimizer, steps):
        for t in steps:
            train_step(
                model, optimizer, batch_at(loader, t), config.layerskip.at(t), t,
                config=config.step_config, runtime=runtime,
            )  # fmt: skip

    settings = {"config": CheckpointConfig(), "identity": identity, "runtime": runtime}
    model, optimizer = begin()
    go_on(model, optimizer, (0, 1))
    moments = [name for name in optimizer.state_dict() if "exp_avg" in name]
    assert moments, "there are moments"
    assert all("own_exits." in name for name in moments)
    with CheckpointWriter(folder / "checkpoints", model, optimizer, **settings) as writer:
        writer.save(2, {}, required=True)
    go_on(model, optimizer, (2, 3))
    straight = tiny.fingerprint(model, optimizer)
    model, optimizer = begin()
    assert resume(folder / "checkpoints", model, optimizer, **settings).t == 2
    go_on(model, optimizer, (2, 3))
    assert tiny.fingerprint(model, optimizer) == straight
    size = sum(f.stat().st_size for f in (folder / "checkpoints" / "step-00000002").iterdir())
    assert size <= checkpoint_bytes(model, config.optim)


@pytest.mark.parametrize("mlp", [False, True])
def test_a_resumed_run_is_bit_exact(tmp_path, mlp):
    run_distributed(check_resume, 2, tmp_path, mlp)


def test_the_space_for_a_checkpoint_is_less_by_the_moments_that_there_are_not():
    config = config_of("all")
    with torch.device("meta"):
        model = Llama(config.model)
    whole = checkpoint_bytes(model, config.optim)
    freeze(model, "exits")
    backbone = sum(p.numel() for n, p in model.named_parameters() if "own_exits" not in n)
    saved = whole - checkpoint_bytes(model, config.optim)
    assert saved == pytest.approx(1.01 * 8 * backbone, abs=1)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Return a run folder with a checkpoint of a plain model."""
    root = tmp_path_factory.mktemp("plain")
    with start_runtime(RuntimeConfig(), seed=0) as runtime:
        model, optimizer = tiny.build(runtime)
        tiny.train(model, optimizer, 0, 3)
        with tiny.writer(root, model, optimizer, runtime) as writer:
            writer.save(3, {}, required=True)
    return root


def check_start(runtime, root):
    plain = load_model(find_checkpoint(root), device=torch.device("cpu"), dtype=torch.float32)
    theirs = dict(plain.named_parameters())
    for mlp in (False, True):
        model, _ = tiny.build(runtime, own_exits=(1,), own_exit_mlp=mlp)
        load_initial_weights(str(root), model, runtime=runtime)
        for name, value in model.state_dict().items():
            original = name
            if name.startswith("own_exits."):
                part = name.removeprefix("own_exits.1.")
                original = part if part == "norm.weight" else f"layers.1.{part}"
            assert torch.equal(value.full_tensor(), theirs[original]), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_exits_begin_as_copies_of_the_last_layers_parts(plain_run, ranks):
    run_distributed(check_start, ranks, plain_run)


def test_routers_of_a_plain_model_begin_by_letting_every_token_run(plain_run, caplog):
    caplog.set_level(logging.INFO)
    plain = load_model(find_checkpoint(plain_run), device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.arange(16).view(2, 8)
    with start_runtime(RuntimeConfig(), seed=0) as runtime:
        model, _ = tiny.build(runtime, router="linear", own_exits=(1,))
        load_initial_weights(str(plain_run), model, runtime=runtime)
        hidden = model(tokens, exit_layers=[0, 1])
        theirs = plain(tokens, exit_layers=[0, 1]).exits
        assert all((p > 0.5).all() for p in hidden.gates.values())
        assert all(torch.equal(x, theirs[l]) for l, x in hidden.exits.items())
    assert "checkpoint: the routers, which it lacks, start by letting every token run" in (
        caplog.messages
    )


def test_what_was_copied_is_logged_and_other_shapes_are_refused(plain_run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with start_runtime(RuntimeConfig(), seed=0) as runtime:
        model, optimizer = tiny.build(runtime, own_exits=(1,))
        load_initial_weights(str(plain_run), model, runtime=runtime)
        assert caplog.messages[-1] == (
            "checkpoint: the exits E = 1, which it lacks, start as copies of its final norm"
        )
        config = replace(tiny.MODEL, own_exits=(1,))
        with CheckpointWriter(
            tmp_path / "checkpoints", model, optimizer, config=CheckpointConfig(),
            identity=replace(tiny.identity(tmp_path), model=config), runtime=runtime,
        ) as writer:  # fmt: skip
            writer.save(1, {}, required=True)
        again, _ = tiny.build(runtime, own_exits=(1,))
        load_initial_weights(str(tmp_path), again, runtime=runtime)
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), again.state_dict()[name].full_tensor()), name
        for root, fields, differing in (
            (plain_run, {"own_exits": (1,), "ffn_dim": 32}, "model.ffn_dim 24 (configured: 32)"),
            (
                plain_run,
                {"vocab_size": 60, "ffn_dim": 32},
                "model.ffn_dim 24 (configured: 32), model.vocab_size 50 (configured: 60)",
            ),
            (tmp_path, {}, "model.own_exits (1,) (configured: ())"),
            (
                tmp_path,
                {"own_exits": (1,), "own_exit_mlp": True},
                "model.own_exit_mlp False (configured: True)",
            ),
        ):
            other, _ = tiny.build(runtime, **fields)
            with pytest.raises(ValueError, match="checkpoint.init_from: ") as error:
                load_initial_weights(str(root), other, runtime=runtime)
            assert str(error.value).endswith(
                f" is of another model, with {differing}; configure that model or name another run"
            )


def test_a_plan_of_memory_holds_moments_and_gradients_of_what_learns_alone():
    model = replace(MEMORY_MODEL, own_exits=(2, 3), own_exit_mlp=True)
    work = make_work(model=model, microbatches=1)
    plan = StepPlan((0.0,) * 4, (1, 2), {1: 0.5, 2: 0.5})
    frozen = replace(work.step, optim=OptimConfig(lr=1e-3, trains="exits"))
    need = measure(replace(work, plan=plan, step=frozen), on_gpu=False).device
    whole = measure(replace(work, plan=plan), on_gpu=False).device
    own = 4 * own_exit_params(model)
    assert need.parts["moments"] == pytest.approx(2 * own, rel=0.001)
    assert need.highest["gradients"] == pytest.approx(own, rel=0.001)
    assert need.parts["parameters"] == whole.parts["parameters"]
    assert need.highest["activations"] < whole.highest["activations"] / 2
    assert whole.parts["moments"] > 2 * own


def check_memory(runtime):
    """What is planned is what there is."""
    model_config = replace(MEMORY_MODEL, own_exits=(2, 3), own_exit_mlp=True)
    model = build_model(model_config, ParallelConfig(shard="blocks"), runtime, 0, trains="exits")
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, trains="exits"))
    moments = [v for v in optimizer.state_dict().values() if isinstance(v, torch.Tensor)]
    assert local_bytes(moments) == pytest.approx(8 * own_exit_params(model_config), rel=0.001)


def test_moments_are_of_what_learns_alone():
    run_distributed(check_memory, 1)


OWN = {"model__own_exits": "1 3", "optim__trains": "exits"}


def test_the_command_tunes_the_exits_of_a_plain_run_and_leaves_its_last_layer(launch):
    before = launch(name="plain")
    assert before.wait() == [0, 0], before.output
    tuning = OWN | {
        "model__own_exit_mlp": True,
        "checkpoint__init_from": before.run,
        "layer_dropout__p_max": 0,
        "curriculum__C": "all",
        "early_exit__exits": "1 3",
        "early_exit__weights": "uniform",
        "adam_monitor__interval_steps": 2,
        "replica_check__interval_steps": 2,
        "parallel__dp_replicate": 2,
        "optim__lr": 1e-2,
    }
    after = launch(name="tuned", **tuning)
    assert after.wait() == [0, 0], after.output
    assert "which it lacks, start as copies of its last layer's feed-forward and" in after.output
    plain, tuned = (
        [r for r in records(job.run) if "validation/loss" in r][-1] for job in (before, after)
    )
    assert tuned["validation/loss_exit_04"] == plain["validation/loss_exit_04"]
    assert tuned["validation/loss_exit_02"] == plain["validation/loss_exit_02"]
    for exit_ in ("01", "03"):
        assert tuned[f"validation/loss_exit_{exit_}"] < plain[f"validation/loss_exit_{exit_}"]
    steps = [r for r in records(after.run) if "train/J" in r]
    exits = {name for r in steps for name in r if name.startswith("train/loss")}
    assert exits == {"train/loss_exit_01", "train/loss_exit_03"}
    groups = {n for r in records(after.run) for n in r if "adam/update_rms" in n}
    assert groups == {"adam/update_rms/own_exits_01", "adam/update_rms/own_exits_03"}
    models = [
        load_model(find_checkpoint(job.run), device=torch.device("cpu"), dtype=torch.float32)
        for job in (after, before)
    ]
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "optim.trains: exits, but no exit of the model has parts of its own"),
        ({"checkpoint": CheckpointConfig()}, "checkpoint.init_from: empty, but with optim.trains"),
        (
            {"curriculum": CurriculumConfig(C="grad"), "early_exit": EarlyExitConfig()},
            r"optim.trains: exits, but at step 0 none of model.own_exits \(2, 3\) is on",
        ),
    ],
    ids=range(3),
)
def test_what_could_not_learn_is_refused_in_one_line(changes, message):
    config = config_of("exits")
    if "model" in changes:
        changes = {"model": dataclasses.replace(config.model, own_exits=(), own_exit_mlp=False)}
    with pytest.raises(ValueError, match=message) as caught:
        replace(config, **changes).check(1)
    assert "\n" not in str(caught.value)
