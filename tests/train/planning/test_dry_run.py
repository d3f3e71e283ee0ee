"""The plan that --dry_run prints, against figures worked by hand, and what it refuses."""

import dataclasses
import re
import time

import pytest

from loss.curriculum import CurriculumConfig
from loss.early_exit import EarlyExitConfig
from models.config import LlamaConfig
from models.layer_dropout import LayerDropoutConfig
from train import main as command
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.config.command_line import DryRun
from train.config.config import TrainConfig
from train.config.presets import PRESETS
from train.loop.data_config import DataConfig
from train.optimizer.optim import OptimConfig
from train.parallel.parallelize import ParallelConfig
from train.planning.dry_run import plan_run


def make_config(**overrides):
    fields = {
        "name": "small",
        "steps": 4,
        "model": LlamaConfig(
            dim=64, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=128, vocab_size=500,
            max_seq_len=32,
        ),
        "data": DataConfig(
            path="no/such/data", seq_len=32, global_batch_size=16, microbatch_size=2
        ),
        "optim": OptimConfig(lr=1e-3),
        "curriculum": CurriculumConfig(C="rot", R=2),
        "layer_dropout": LayerDropoutConfig(p_max=0.5, S="constant", D="linear"),
    }  # fmt: skip
    return TrainConfig(**(fields | overrides))


def with_data(**fields):
    return {"data": dataclasses.replace(make_config().data, **fields)}


WIDE = dataclasses.replace(make_config().model, dim=512, ffn_dim=1024)
WORDY = dataclasses.replace(make_config().model, n_layers=1, vocab_size=20_000)


def test_the_plan_states_sizes_and_work():
    text = plan_run(make_config(), DryRun(ranks=4))
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    total = 4 * block + 2 * 500 * 64 + 64
    assert f"{total:,}: 4 layers of {block:,}, embeddings and head {2 * 500 * 64 + 64:,}" in text
    assert "1 replicate x 4 shard" in text
    assert "512 tokens: 16 sequences of 32, 2 x 2 on each GPU" in text
    assert "4 steps x 512 = 2,048 tokens" in text
    assert "another batch or seq_len changes the tokens; --tokens 2048 keeps them" in text
    # On 1 GPU the recipe's FLOPs at 40 % of 989 TFLOP/s; 8 GPUs take their microbatches of 2.
    rows = re.findall(r"^ +(\d+) +([0-9.]+) s .*% +([0-9,]+) +([0-9.]+)% ", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "4", "8"]
    recipe = 3 * (6 * block + 6 * 64 * 32) + 2.5 * 6 * 64 * 500
    assert int(rows[0][2].replace(",", "")) == pytest.approx(0.4 * 989e12 / recipe, rel=1e-6)
    assert rows[0][3] == "40.0"
    assert f"{12 * total / 2**20:.2f} MiB on disk" in text
    # p_max = 0.5 over layers 0, 1/3, 2/3, 1 drops one layer of four. Exits by step, t = 0, 1, 2, 3:
    # {0, 2, 3}, {1, 3}, {0, 2, 3}, {1, 3}, 2.5 on average.
    layer, head = 6 * block + 6 * 64 * 32, 6 * 64 * 500
    assert f"{(3 * layer + 2.5 * head) / 1e6:.2f} M on average: 3.00 of 4 layers, 2.50 ex" in text
    assert f"{(4 * layer + 2.5 * head) / 1e6:.2f} M without layer dropout" in text
    assert f"{(4 * layer + head) / 1e6:.2f} M without exits" in text
    assert f"{(3 * layer + 2.5 * head) * 512 / 4 / 1e6:.2f} M on each GPU" in text
    # The step planned for is t = 0.
    assert "the largest step, of 3 exits and no layer dropped" in text
    # A ring of four: bfloat16 blocks twice a microbatch, the root once, fp32 gradients once.
    gathered = 2 * (2 * 2 * 4 * block + 2 * 500 * 64 + 64)
    sent = (gathered + 4 * total) * 3 / 4 / 2**20
    [stated] = re.findall(r"sent per step +([0-9.]+) MiB", text)
    assert float(stated) == pytest.approx(sent, rel=0.01)


def test_exits_that_see_a_share_of_the_tokens_count_by_that_share():
    text = plan_run(make_config(early_exit=EarlyExitConfig(token_fraction=0.5)), DryRun(ranks=4))
    # 3 or 2 exits in turn, the last of which sees every token: 2 or 1.5.
    layer, head = 6 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 6 * 64 * 32, 6 * 64 * 500
    assert f"{(3 * layer + 1.75 * head) / 1e6:.2f} M on average: 3.00 of 4 layers, 1.75 ex" in text


def test_the_plan_of_a_frozen_backbone_counts_what_learns():
    model = dataclasses.replace(make_config().model, own_exits=(1, 3), own_exit_mlp=True)
    text = plan_run(
        make_config(
            model=model,
            optim=OptimConfig(lr=1e-3, trains="exits"),
            layer_dropout=LayerDropoutConfig(),
            curriculum=CurriculumConfig(C="all"),
            checkpoint=CheckpointConfig(init_from="another"),
        ),
        DryRun(ranks=4),
    )
    block, own = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64, 2 * (3 * 64 * 128 + 2 * 64)
    total = 4 * block + 2 * 500 * 64 + 64 + own
    assert f"{total:,}: 4 layers of {block:,}" in text
    assert f"embeddings and head {2 * 500 * 64 + 64:,}, exits' own parts {own:,}" in text
    assert re.search(rf"learn +{own:,} of them", text)
    assert f"{(4 * total + 8 * own) / 2**20:.2f} MiB on disk" in text
    flops = 3 * 2 * (block + 64 * 32) + 2 * 4 * 64 * 500 + 6 * own
    assert f"{flops / 1e6:.2f} M on average: 3.00 of 4 layers, 2.00 exits" in text
    [moments] = re.findall(r"moments \(fp32\) +([0-9.]+) MiB", text)
    assert float(moments) == pytest.approx(8 * own / 4 / 2**20, abs=0.01)


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    text = plan_run(make_config(optim=OptimConfig(lr=1e-3, name="muon")), DryRun(ranks=4))
    matrices = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    rest = 4 * 2 * 64 + 2 * 500 * 64 + 64
    assert f"{(8 * matrices + 12 * rest) / 2**20:.2f} MiB on disk" in text


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_parts_add_up_to_the_whole(name):
    text = plan_run(make_config(optim=OptimConfig(lr=1e-3, name=name)), DryRun(ranks=4))
    figures = [
        float(size)
        for size in re.findall(r"^  (?! all)\S.{29}\s+([0-9.]+) MiB", text, re.MULTILINE)
    ]
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.05)
    assert len(figures) > 7


@pytest.mark.parametrize(
    ("overrides", "machine", "message"),
    [
        ({}, {"ranks": 3}, "data.global_batch_size: 16 is not a multiple of 3 ranks"),
        ({}, {"ranks": 0}, "ranks: 0, must be at least 1"),
        ({}, {"mfu": 1.5}, "mfu: 1.5, must lie in (0, 1]"),
        ({}, {"network_gb": 0}, "network_gb: 0, must be positive and finite"),
        ({}, {"memory_gib": -1}, "memory_gib: -1, must be positive"),
        ({}, {"memory_gib": float("nan")}, "memory_gib: nan, must be positive and finite"),
        ({}, {"memory_gib": float("inf")}, "memory_gib: inf, must be positive and finite"),
        (
            {"parallel": ParallelConfig(shard="blocks", dp_replicate=3)},
            {"ranks": 4},
            "parallel.dp_replicate: 3",
        ),
    ],
)
def test_what_does_not_divide_is_refused(overrides, machine, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_run(make_config(**overrides), DryRun(**machine))


@pytest.mark.parametrize(
    ("ranks", "overrides", "part", "lever"),
    [
        (
            8,
            {"model": WIDE} | with_data(microbatch_size=1),
            "gradients, not yet reduced",
            "parallel.reduce_every_microbatch True, a larger data.microbatch_size",
        ),
        (
            1,
            {"model": WIDE} | with_data(microbatch_size=1, global_batch_size=1),
            "parameters, gradients and moments",
            "parallel.cpu_offload True, more ranks",
        ),
        (
            8,
            with_data(microbatch_size=64, global_batch_size=512),
            "activations",
            "parallel.activation_checkpointing full, a data.microbatch_size below 64",
        ),
        (
            8,
            {"model": WORDY, "curriculum": CurriculumConfig()}
            | with_data(microbatch_size=64, global_batch_size=512),
            "loss and head",
            "an early_exit.chunk_rows below 4096",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_largest_part_and_what_lessens_it(
    ranks, overrides, part, lever
):
    with pytest.raises(ValueError, match=f"memory_gib: .* of it for {part}; try ") as error:
        plan_run(make_config(**overrides), DryRun(ranks=ranks, memory_gib=1e-4))
    assert lever in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_just_fits_is_planned_and_one_that_just_does_not_is_refused():
    text = plan_run(make_config(), DryRun(ranks=4))
    [mib] = re.findall(r"^  all +([0-9.]+) MiB", text, re.MULTILINE)
    gib = float(mib) / 1024 / 0.95
    plan_run(make_config(), DryRun(ranks=4, memory_gib=gib * 1.01))
    with pytest.raises(ValueError, match="memory_gib"):
        plan_run(make_config(), DryRun(ranks=4, memory_gib=gib * 0.99))


def test_7b_on_64_gpus_is_planned_in_under_a_minute_of_one_core():
    begin = time.process_time()
    text = plan_run(PRESETS["scratch_7b"](), DryRun(ranks=64))
    assert time.process_time() - begin < 60
    assert "6,738,415,616: 32 layers of 202,383,360" in text
    # fp32, a 64th: 0.39 GiB and the rotary table; two moments; the whole gradient before its sum.
    for row in ("(fp32)  .* 0.40 GiB", "moments (fp32) .* 0.78", "not yet reduced .* 25.10"):
        assert re.search(row.replace("(", r"\(").replace(")", r"\)"), text)
    # 16 dim + 8 ffn_dim bytes a token and layer, and what the exits read.
    [activations] = re.findall(r"activations +[0-9.]+ GiB +([0-9.]+)", text)
    by_hand = 4096 * 32 * (16 * 4096 + 8 * 11008) / 2**30
    assert float(activations) == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("demo")])
def test_every_demo_is_planned(name):
    assert plan_run(PRESETS[name](), DryRun(ranks=1)).startswith(f"{name} on 1 GPUs\n")


def test_the_command_prints_the_plan_without_data_or_refuses_in_one_line(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "start_logging", lambda: None)
    dry = ["demo", "--dry_run", "--ranks", "2", "--data.path", "no/such"]
    assert command.main(dry) == 0
    assert capsys.readouterr().out.startswith("demo on 2 GPUs\nparameters        2,001,024: ")
    assert command.main([*dry, "--gpu", "H200", "--tokens", "1e6"]) == 0
    printed = capsys.readouterr().out
    assert "--tokens sets the steps: another batch or seq_len keeps the tokens" in printed
    assert "  A GPU has 140 GiB;" in printed
    assert command.main([*dry, "--memory_gib", "0.01"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory_gib: 0.01 leave 9.73 MiB but each of 2 GPUs needs ")
    assert list(tmp_path.iterdir()) == []
