"""The training command, as users run it: real processes, real kills, one-line errors."""

import gzip
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.dataset import open_dataset
from data.loader import TokenLoader
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.windows import StreamWindows
from inference.evaluation.exit_quality import evaluate_exits
from models.checkpoint_format import checkpoint_steps, find_checkpoint, load_model
from models.conversion.plain_checkpoint import read_checkpoint
from train import main as command
from train.main import RUN_HELD, due, main
from train.monitoring.sections import Sections
from train.run_folder.run_lock import acquire


def fingerprint(run):
    """Return a hash of every parameter of the run's newest checkpoint."""
    model = load_model(find_checkpoint(run), device=torch.device("cpu"), dtype=torch.float32)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def quiet(monkeypatch):
    """Leave pytest's logging alone when the command runs in this process."""
    monkeypatch.setattr(command, "start_logging", lambda: None)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_dashboard(run):
    """Check what TensorBoard has of a run of 4 exits over 8 steps that was resumed after step 3."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [e.step for e in events.Scalars("loss/train")] == list(range(1, 9))
    assert [e.step for e in events.Scalars("margin/high")] == [4, 8]
    assert [e.value for e in events.Scalars("marks/restarts")] == [0.0] * 3 + [1.0] * 5
    assert set(events.Tags()["images"]) >= {
        "losses_held_out/all_exits", "losses_train/all_exits", "schedule/dropped_layers",
        "speculation/acceptance", "speculation/agreement",
    }  # fmt: skip
    texts = {
        tag: [tensor.tensor_proto.string_val[0].decode() for tensor in events.Tensors(tag)]
        for tag in ("settings", "marks", "samples/prompt_1")
    }
    assert "**all 4 layers**" in texts["samples/prompt_1"][-1]
    assert "| optim.lr | 0.004 | 0.003 |" in texts["settings"][-1]
    assert "| 3 | resumed on 2 ranks |" in texts["marks"][-1]
    assert "| 7 | batch of 4 becomes 8 |" in texts["marks"][-1]


def test_a_killed_run_started_again_ends_in_the_same_parameters_bit_for_bit(training, launch):
    # Written at once: the checkpoint of step 3 is there when step 4 is logged. Kills while one is
    # written in the background are tests/faults/test_checkpoints.py's.
    often = {"ranks": 2, "metrics__interval_steps": 1, "checkpoint__asynchronous": False}
    often |= {"data__ramp_start": 4, "data__ramp_increment": 4, "data__ramp_steps": 6}
    often |= {"optim__ema_decay": 0.9, "checkpoint__final_model": "float32"}
    often |= {"speculation__interval_steps": 2, "speculation__new_tokens": 8}
    job = launch(**often, name="straight")
    assert job.wait() == [0, 0], job.output
    assert "step-00000008" in job.output
    assert "\r" not in job.output, "the live line is for terminals"
    run = training.output / "straight"
    assert f"next: python -m inference.tune --run {run} --quick" in job.output
    killed = training.run_killed_after("step 4/8", **often, name="killed")
    assert "step 6/8" not in killed
    status, output = training.run(**often, name="killed")
    assert status == 0, output
    assert "resuming from" in output
    assert "step 3" in output
    straight, resumed = training.output / "straight", training.output / "killed"
    assert fingerprint(resumed) == fingerprint(straight)
    samples = [
        {p.name: p.read_text() for p in (r / "samples").iterdir()} for r in (straight, resumed)
    ]
    assert [*map(sorted, samples)] == 2 * [[f"step-0000000{t}.md" for t in (2, 4, 6, 8)]]
    assert samples[0] == samples[1]
    averages = [read_checkpoint(find_checkpoint(run), "ema")[1] for run in (straight, resumed)]
    exported = read_checkpoint(straight / "model")[1]
    for name, average in averages[0].items():
        assert torch.equal(average, averages[1][name]), name
        assert torch.equal(average.to(exported[name].dtype), exported[name]), name
    # Nothing is logged twice, and what is logged is the same, but for timings.
    for a, b in zip(records(resumed), records(straight), strict=True):
        timed = ("perf/", "progress/goodput", "progress/restarts")
        untimed = [{k: v for k, v in r.items() if not k.startswith(timed)} for r in (a, b)]
        assert untimed[0] == untimed[1]
    check_dashboard(resumed)
    # Without the continuations of prompts, the weights are the same to the bit.
    job = launch(**often | {"speculation__interval_steps": 0}, name="without")
    assert job.wait() == [0, 0], job.output
    assert fingerprint(training.output / "without") == fingerprint(straight)
    # The same command once more has nothing left to do.
    job = launch(**often, name="killed")
    assert job.wait() == [0, 0], job.output
    assert "has done all its 8 steps" in job.output


def test_one_process_without_torchrun_trains_logs_every_exit_and_is_profiled(training):
    profile = {"profile__start": 3, "profile__steps": 2}
    more = {"curriculum__C": "all", "checkpoint__keep_latest": 1}
    status, output = training.run(name="alone", **more, **profile)
    assert status == 0, output
    run = training.output / "alone"
    by_step = {}
    for record in records(run):
        by_step.setdefault(record["step"], {}).update(record)
    assert list(by_step) == [2, 4, 6, 8]
    for E in range(1, 5):
        assert by_step[4][f"validation/loss_exit_{E:02d}"] > 0
        assert by_step[6][f"train/loss_exit_{E:02d}"] > 0
    assert by_step[8]["validation/loss"] < by_step[4]["validation/loss"]
    assert by_step[8]["optim/lr"] == pytest.approx(3e-4)
    assert json.loads((run / "config.json").read_text())["curriculum"]["C"] == "all"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000008"]
    assert "tok/s" in output
    assert "ETA" in output
    assert "profile: steps 3 to 4 in" in output
    [trace] = (run / "profile").iterdir()
    assert trace.name == "steps-00000003-00000004-rank-0.pt.trace.json.gz"
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("dur")]
    counts = Counter(event["name"] for event in events if event["cat"] == "user_annotation")
    assert [counts[f"ProfilerStep#{t}"] for t in range(2, 6)] == [0, 1, 1, 0]
    # Two steps of four microbatches each.
    assert [counts[name] for name in ("forward", "loss", "backward")] == [8, 8, 8]
    assert counts["optimizer"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"curriculum__R": 0}, "error: curriculum.R: 0, must be at least 1 layer"),
        ({"model__n_heads": 3, "model__n_kv_heads": 3}, "n_heads: 3 does not divide model.dim 16"),
        ({"preset": "dmeo"}, "error: preset: dmeo does not exist, did you mean demo?"),
        ({"layer_dropout__pmax": 1}, "option: --layer_dropout.pmax does not exist, did you mean"),
        (
            {"curriculum__R": 4, "curriculum__last_layer_always_on": False},
            "error: curriculum.last_layer_always_on: False leaves step 0 with the exits E = [1]",
        ),
        (
            {"early_exit__distill": 0.5, "curriculum__last_layer_always_on": False}
            | {"curriculum__C": "rot"},
            "error: curriculum.last_layer_always_on: False, but in distillation the last layer",
        ),
        (
            {"optim__trains": "exits", "model__own_exits": 2, "checkpoint__init_from": "gone"}
            | {"curriculum__C": "alternating", "curriculum__R": 1},
            "error: optim.trains: exits, but at step 1 none of model.own_exits (2,) is on",
        ),
        ({"optim__betas": "2 0.9"}, "error: optim.betas: (2.0, 0.9), must lie in [0, 1)"),
        ({"data__path": "no/such"}, "error: data.path: dataset no/such does not exist, "),
        ({"data__global_batch_size": 7}, "data.global_batch_size: 7 is not a multiple of"),
        ({"model__vocab_size": 200}, "error: model.vocab_size: 200 is smaller than the 400 ids"),
        (
            {"data__seq_len": 10**6, "model__max_seq_len": 10**6},
            "needs 1000001 tokens but the data has",
        ),
        (
            {"checkpoint__init_from": "gone"},
            "error: checkpoint.init_from: gone holds no finished checkpoint",
        ),
    ],
)
def test_a_users_error_is_one_line(training, overrides, message, capsys, quiet):
    assert main(training.arguments(name="wrong", **overrides)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not training.output.exists()


def test_weights_of_another_tokenizer_are_refused_unless_that_is_wanted(
    training, tokenizer_path, tmp_path, capsys, quiet, caplog
):
    assert main(training.arguments(name="first", steps=1)) == 0
    (tmp_path / "a.txt").write_text("".join(f"{n} apples\n\n" for n in range(400)))
    (tmp_path / "b.txt").write_text("".join(f"{n} pears\n\n" for n in range(400)))
    texts = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    prepare(PrepareConfig(input=texts, tokenizer=tokenizer_path), tmp_path / "other", workers=1)
    second = {"name": "second", "steps": 1, "data__path": tmp_path / "other"}
    second["checkpoint__init_from"] = training.output / "first"
    assert main(training.arguments(**second)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "has learnt other tokens than" in line
    assert "--checkpoint.allow_other_tokenizer True" in line
    assert not (training.output / "second").exists()
    caplog.set_level("INFO")
    wanted = training.arguments(
        **second, checkpoint__allow_other_tokenizer="", optim__warmup_steps=500
    )
    assert main(wanted) == 0
    assert "model.vocab_size: 400, of which" in caplog.text
    assert "optim.warmup_steps: 500, but the run has 1 steps" in caplog.text


def test_all_problems_are_reported_at_once(training, capsys, quiet):
    wrong = training.arguments(name="wrong", curriculum__R=0, steps=0, optim__lr=-1)
    assert main(wrong) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_a_truncated_shard_is_one_line(training, corpus, tmp_path, capsys, quiet):
    copy = shutil.copytree(corpus, tmp_path / "torn")
    [shard] = copy.glob("train-*.tokens")
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(training.arguments(name="torn", data__path=copy)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert shard.name in line


def test_a_check_refuses_what_a_run_would_be_refused_for_and_leaves_nothing(
    training, tmp_path, monkeypatch, capsys, quiet
):
    def check(**overrides):
        status = main([*training.arguments(name="checked", **overrides), "--check"])
        return status, capsys.readouterr().err

    assert check() == (0, "")
    assert check(model__vocab_size=200)[0] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "is not a multiple of 3 ranks" in check()[1]
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "file").touch()
    assert (
        f"error: output_dir: {tmp_path}/file is no folder" in check(output_dir=tmp_path / "file")[1]
    )
    assert not training.output.exists()
    run = training.output / "checked"
    run.mkdir(parents=True)
    lock = acquire(run, "another job")
    status, error = check()
    assert (status, error.count("error: ")) == (RUN_HELD, 1)
    assert "is being written by process" in error
    lock.release()
    assert check() == (0, "")


def test_a_run_folder_of_another_model_size_is_refused(training, launch):
    assert launch(name="sized", steps=1).wait() == [0, 0]
    restarts = ["--max-restarts", "3"]  # in vain: it is refused by all ranks together
    status, output = training.run(
        name="sized", steps=2, model__n_layers=3, ranks=2, launcher=restarts
    )
    assert_error_ends(status, output, "name: ")
    assert "is of another model, with model.n_layers 4 (configured: 3)" in output


def assert_error_ends(status, output, message):
    """Assert that a command has ended with a user's error, and torchrun has added nothing."""
    lines = output.splitlines()
    assert status == 2, output
    assert lines[-1].startswith(f"error: {message}"), output
    assert output.count("error: ") == 1, output
    assert len(lines) <= 10, output


def test_a_wrong_option_is_one_line_under_torchrun(training):
    status, output = training.run(ranks=2, launcher=["--max-restarts", "3"], lr="1e-3")
    assert_error_ends(status, output, "option: --lr does not exist, did you mean --optim.lr?")


def test_ctrl_c_while_importing_ends_without_a_traceback(training):
    process = training.start()
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (-signal.SIGINT, "")


def test_a_new_run_starts_from_given_weights(launch):
    first = launch(name="first", steps=1)
    assert first.wait() == [0, 0], first.output
    second = launch(name="second", checkpoint__init_from=first.run, steps=1, optim__lr=1e-30)
    assert second.wait() == [0, 0], second.output
    assert "starting from the weights of" in second.output
    assert fingerprint(second.run) == fingerprint(first.run)


def test_help_lists_presets_and_documents_every_field(training):
    help_text = subprocess.run(
        [sys.executable, "train/main.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for preset in ("demo", "scratch_1_5b", "finetune_topv2"):
        assert preset in help_text
    for field in ("--layer_dropout.p_max", "--curriculum.R", "--early_exit.e_scale", "--optim.lr"):
        assert field in help_text
    assert "Drop probability of the last layer" in " ".join(help_text.replace("│", " ").split())


def test_a_loss_that_stays_not_finite_stops_the_run(training, capsys, quiet):
    wild = training.arguments(
        name="wild", optim__lr=1e30, optim__warmup_steps=0, recovery__max_skipped_updates=2
    )
    assert main(wild) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: recovery: 2 steps in a row were not finite")
    assert "no checkpoint from before step 1 to roll back to" in line


def test_a_preset_for_gpus_trains_uncompiled_on_a_cpu(training, quiet, caplog):
    caplog.set_level("INFO")
    assert main(training.arguments(preset="layerskip_110m", name="gpu", steps=2)) == 0
    assert "parallel.compile: off, on cpu" in caplog.text


def test_the_share_of_the_time_that_waits_for_data_is_logged(training, monkeypatch, quiet, caplog):
    caplog.set_level("INFO")
    now, batches, step = [0.0], TokenLoader.batches, command.train_step

    def slow_batches(*rows, **how):
        for batch in batches(*rows, **how):
            now[0] += 3.0
            yield batch

    def slow_step(*parts, **how):
        now[0] += 5.0
        return step(*parts, **how)

    monkeypatch.setattr("train.job.Sections", lambda: Sections(lambda: now[0]))
    monkeypatch.setattr(TokenLoader, "batches", slow_batches)
    monkeypatch.setattr(command, "train_step", slow_step)
    assert main(training.arguments(name="slow", steps=4, validate__interval_steps=0)) == 0
    logged = [r for r in records(training.output / "slow") if "perf/data_wait" in r]
    assert [(r["step"], r["perf/data_wait"]) for r in logged] == [(2, 0.375), (4, 0.375)]
    assert logged[0]["perf/tokens_per_second"] == 2 * 8 * 16 / 16.0
    assert "| data wait 37.5% |" in caplog.text


def test_weights_that_are_not_finite_are_never_saved(training, quiet):
    wild = training.arguments(
        name="wild", optim__lr=1e30, metrics__interval_steps=9, checkpoint__interval_steps=1
    )
    main(wild)
    for checkpoint in checkpoint_steps(training.output / "wild" / "checkpoints").values():
        model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_training_and_inference_measure_the_same_held_out_loss(launch, corpus):
    job = launch(steps=2, validate__sequences=11)
    assert job.wait() == [0, 0], job.output
    model = load_model(find_checkpoint(job.run), device=torch.device("cpu"), dtype=torch.float32)
    exits, tokens = evaluate_exits(
        model,
        StreamWindows(open_dataset(corpus).stream("validation"), 16),
        bytes_per_token=1.0,
        max_tokens=11 * 16,
    )
    assert tokens == 11 * 16
    [record] = [r for r in records(job.run) if "validation/loss" in r]
    for quality in exits:
        assert record[f"validation/loss_exit_{quality.E:02d}"] == pytest.approx(quality.loss, 1e-5)


def test_due_steps_are_the_multiples_and_the_last():
    assert [s for s in range(1, 8) if due(3, s, 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if due(0, s, 7)] == [7]
