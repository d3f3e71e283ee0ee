"""A checkpoint is whole or not there, training does not wait for it, and a failure is survived."""

import logging
import os
import resource
import subprocess
import threading
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from models.checkpoint_format import checkpoint_steps, load_model, verify
from models.tensor_reader import TensorReader
from tests.distributed import run_distributed
from tests.train import tiny
from train.checkpoints import checkpointer, local_folder
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.content import checkpoint_bytes
from train.optimizer.optim import OptimConfig
from train.parallel.runtime import RuntimeConfig, start_runtime


@pytest.fixture(scope="module")
def runtime():
    with start_runtime(RuntimeConfig(), seed=0) as alone:
        yield alone


@pytest.fixture
def trained(runtime):
    model, optimizer = tiny.build(runtime)
    tiny.train(model, optimizer, 0, 3)
    return model, optimizer


@contextmanager
def small_files():
    """Let this process write no file of more than 10 kB; pytest's own output may be such a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def warnings(caplog):
    return [
        record.message
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("train.")
    ]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def load_again(root, runtime):
    """Return (t, state, fingerprint) of what a new process would go on with."""
    model, optimizer = tiny.build(runtime)
    found = tiny.load_newest(root, model, optimizer, runtime)
    return found.t, found.state, tiny.fingerprint(model, optimizer)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_the_step_it_says(runtime, trained, tmp_path, asynchronous, monkeypatch):
    model, optimizer = trained
    saved, state = tiny.fingerprint(model, optimizer), {"skipped": [[3, 7]]}
    go_on = threading.Event()
    save = checkpointer.save
    monkeypatch.setattr(checkpointer, "save", lambda *a, **k: go_on.wait(60) and save(*a, **k))
    if not asynchronous:
        go_on.set()
    with tiny.writer(tmp_path, model, optimizer, runtime, asynchronous=asynchronous) as writer:
        writer.save(3, state)
        # Training goes on before a byte is written.
        state["skipped"].append("later")
        tiny.train(model, optimizer, 3, 5)
        if asynchronous:
            assert not checkpoint_steps(tmp_path / "checkpoints")
        go_on.set()
        writer.wait()
    assert load_again(tmp_path, runtime) == (3, {"skipped": [[3, 7]]}, saved)


def test_a_required_checkpoint_is_written_when_save_returns(runtime, trained, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with tiny.writer(tmp_path, *trained, runtime, asynchronous=True) as writer:
        writer.save(2, {})
        writer.save(3, {}, required=True)
        assert list(checkpoint_steps(tmp_path / "checkpoints")) == [2, 3]
    kept = tmp_path / "checkpoints" / "step-00000003"
    assert "chat_template.jinja" in verify(kept).files
    assert (kept / "chat_template.jinja").read_text() == "{{ messages }}"


def test_leaving_waits_for_the_checkpoint_in_flight(runtime, trained, tmp_path):
    with tiny.writer(tmp_path, *trained, runtime, asynchronous=True) as writer:
        writer.save(3, {})
    assert verify(tmp_path / "checkpoints" / "step-00000003").step == 3


def test_all_is_on_the_disk_before_the_name_is_given(runtime, trained, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, type(tmp_path).rename

    def noted_fsync(number):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def noted_rename(path, target):
        events.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(type(tmp_path), "rename", noted_rename)
    with tiny.writer(tmp_path, *trained, runtime, asynchronous=False) as writer:
        writer.save(3, {})
    given = events.index("rename to step-00000003")
    # .metadata and the manifest are synced under names they lose before.
    assert {
        "__0_0.distcp",
        ".metadata.tmp",
        "tokenizer.model",
        "manifest.json.tmp",
        "step-00000003.tmp",
    } <= set(events[:given])
    assert events[given + 1 :] == ["checkpoints"]


def test_a_step_written_again_replaces_the_first(runtime, trained, tmp_path):
    with tiny.writer(tmp_path, *trained, runtime) as writer:
        writer.save(3, {"a": 1}, required=True)
        writer.save(3, {"a": 2}, required=True)
    assert names(tmp_path / "checkpoints") == ["step-00000003"]
    assert load_again(tmp_path, runtime)[1] == {"a": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_written(runtime, trained, tmp_path, value):
    model, optimizer = trained
    with torch.no_grad():
        model.norm.weight.to_local()[3] = value
    with (
        tiny.writer(tmp_path, model, optimizer, runtime) as writer,
        pytest.raises(FloatingPointError, match=r"norm\.weight is not finite after step 3"),
    ):
        writer.save(3, {})
    assert not (tmp_path / "checkpoints").exists()


def test_a_failed_checkpoint_is_logged_removed_and_tried_again(runtime, trained, tmp_path, caplog):
    with tiny.writer(tmp_path, *trained, runtime, asynchronous=True) as writer:
        writer.save(1, {})
        writer.wait()
        with small_files():
            writer.save(2, {})
            writer.wait()
        assert names(tmp_path / "checkpoints") == ["step-00000001"]
        writer.save(3, {})
        writer.wait()
    [line] = warnings(caplog)
    assert "checkpoint: could not write step-00000002, " in line
    assert "(ulimit -f): needs 64.8 KiB, " in line
    assert "1 of at most 3 failures in a row" in line
    assert list(checkpoint_steps(tmp_path / "checkpoints")) == [1, 3]
    verify(tmp_path / "checkpoints" / "step-00000001")


def test_too_many_failures_in_a_row_stop_the_run(runtime, trained, tmp_path):
    with tiny.writer(
        tmp_path, *trained, runtime, asynchronous=False, max_failures=2, keep_latest=1
    ) as writer:
        with small_files():
            writer.save(1, {})
        writer.save(2, {})  # sets the count back
        with small_files():
            writer.save(3, {})
            with pytest.raises(OSError, match=r"could not write step-00000004.* \(2 in a row"):
                writer.save(4, {})
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


def test_a_required_checkpoint_may_not_fail(runtime, trained, tmp_path, caplog):
    with (
        tiny.writer(tmp_path, *trained, runtime) as writer,
        small_files(),
        pytest.raises(OSError, match="could not write step-00000003"),
    ):
        writer.save(3, {}, required=True)
    assert not warnings(caplog)  # it is logged once, where the error is caught


def test_an_unwritable_folder_is_a_failure_not_a_crash(runtime, trained, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with (
        tiny.writer(tmp_path, *trained, runtime) as writer,
        pytest.raises(OSError, match="could not write step-00000003.*Not a directory"),
    ):
        writer.save(3, {}, required=True)


def test_a_full_disk_is_reported_with_numbers(runtime, trained, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        with tiny.writer(disk, *trained, runtime, asynchronous=True) as writer:
            writer.save(3, {})
        assert names(disk / "checkpoints") == []
    finally:
        subprocess.run(["umount", disk], check=True)
    [line] = warnings(caplog)
    # 5 520 parameters and two moments in 4 bytes each, and the 21 tensors' counts of steps.
    assert "could not write step-00000003, disk full: needs 64.8 KiB, " in line
    assert "60.0 KiB free at" in line


def fail_on_one_rank(runtime, root):
    model, optimizer = tiny.build(runtime)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    expected = OSError if runtime.is_main else SystemExit
    with tiny.writer(root, model, optimizer, runtime, max_failures=1) as writer:
        writer.save(1, {})
        writer.wait()
        if runtime.is_main:  # it alone commits
            with mock.patch.object(local_folder, "publish", side_effect=OSError("gone")):
                writer.save(2, {})
                with pytest.raises(OSError, match="gone"):
                    writer.wait()
        else:
            writer.save(2, {})
            with pytest.raises(SystemExit):
                writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
        writer.save(3, {})
        with pytest.raises(expected):
            writer.wait()
    if runtime.is_main:
        assert names(root / "checkpoints") == ["step-00000001"]
        verify(root / "checkpoints" / "step-00000001")


def test_a_failure_on_one_rank_is_known_to_all(tmp_path):
    run_distributed(fail_on_one_rank, 2, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_final_model_is_loaded_like_a_checkpoint(runtime, trained, tmp_path, dtype):
    model, optimizer = trained
    with tiny.writer(tmp_path, model, optimizer, runtime, final_model=dtype) as writer:
        writer.write_model(tmp_path / "model", 3)
    found = load_model(tmp_path / "model", device=torch.device("cpu"), dtype=torch.float32)
    for name, value in model.state_dict().items():
        expected = value.full_tensor().to(getattr(torch, dtype)).float()
        assert torch.equal(found.state_dict()[name], expected), name
    stored = TensorReader(tmp_path / "model").read_metadata().state_dict_metadata
    assert set(stored) == {f"model.{name}" for name in model.state_dict()}
    assert {entry.properties.dtype for entry in stored.values()} == {getattr(torch, dtype)}


def test_no_final_model_unless_configured(runtime, trained, tmp_path):
    with tiny.writer(tmp_path, *trained, runtime) as writer:
        writer.write_model(tmp_path / "model", 3)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_size_is_known_before(runtime, tmp_path, name):
    model, optimizer = tiny.build(runtime, optim=name, dim=256, vocab_size=4000)
    with tiny.writer(tmp_path, model, optimizer, runtime) as writer:
        writer.save(0, {}, required=True)
    files = (tmp_path / "checkpoints" / "step-00000000").iterdir()
    size = sum(path.stat().st_size for path in files)
    assert size <= checkpoint_bytes(model, OptimConfig(lr=1.0, name=name)) <= 1.06 * size


def test_problems_name_the_field():
    assert CheckpointConfig().problems() == []
    assert CheckpointConfig(step=3).problems() == [
        "checkpoint.step: 3 without checkpoint.resume_from, name the run to branch off"
    ]
    assert CheckpointConfig(max_failures=0, keep_every_steps=-1).problems() == [
        "checkpoint.keep_every_steps: -1, must be at least 0",
        "checkpoint.max_failures: 0, must be at least 1",
    ]
