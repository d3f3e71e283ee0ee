"""Training resumes from its checkpoint on any number of ranks, or is refused with a reason."""

import hashlib
import logging
import os
import pickle
import shutil

import pytest
import torch

from models.checkpoint_format import MANIFEST, checkpoint_steps, read_manifest
from tests.distributed import run_distributed
from tests.models.test_checkpoint_format import edit_manifest, rewrite_metadata
from tests.train import tiny
from train.checkpoints.compatibility import ABSENT, differences, is_harmless
from train.checkpoints.content import training_tensors
from train.checkpoints.resume import Resumed, load_earlier
from train.checkpoints.start import load_initial_weights
from train.checkpoints.verified import newest_intact
from train.parallel.runtime import RuntimeConfig, start_runtime


@pytest.fixture(scope="module")
def runtime():
    with start_runtime(RuntimeConfig(), seed=0) as alone:
        yield alone


@pytest.fixture(scope="module")
def finished(runtime, tmp_path_factory):
    """Return a run folder with checkpoints at steps 3, 6 and 8, and their fingerprints."""
    root, prints = tmp_path_factory.mktemp("run"), {0: None}
    model, optimizer = tiny.build(runtime)
    with tiny.writer(root, model, optimizer, runtime) as writer:
        for before, step in ((0, 3), (3, 6), (6, 8)):
            tiny.train(model, optimizer, before, step)
            writer.save(step, {"at": step}, required=True)
            prints[step] = tiny.fingerprint(model, optimizer)
    return root, prints


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of that run, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def prints(finished):
    return finished[1]


def go_on(run, runtime, *, allow_config_changes=False, **config):
    """Return (t, state, fingerprint) of what the run goes on with."""
    model, optimizer = tiny.build(runtime)
    found = tiny.load_newest(run, model, optimizer, runtime, allow=allow_config_changes, **config)
    return found.t, found.state, tiny.fingerprint(model, optimizer)


def go_back(run, runtime, last_step):
    model, optimizer = tiny.build(runtime)
    found = load_earlier(
        run / "checkpoints",
        model,
        optimizer,
        last_step=last_step,
        identity=tiny.identity(run),
        runtime=runtime,
    )
    return found.t, found.state, tiny.fingerprint(model, optimizer)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def remove(path):
    path.unlink()


def test_the_newest_is_loaded_with_its_state(run, runtime, prints):
    assert go_on(run, runtime) == (8, {"at": 8}, prints[8])


def test_a_new_run_starts_at_step_0(tmp_path, runtime):
    model, optimizer = tiny.build(runtime)
    found = tiny.load_newest(tmp_path, model, optimizer, runtime)
    assert found == Resumed(0, {})


@pytest.mark.parametrize("damage", [flip_bit, cut, remove])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "tokenizer.model", MANIFEST])
def test_damage_is_found_and_the_next_older_is_taken(run, runtime, prints, damage, name, caplog):
    damage(run / "checkpoints" / "step-00000008" / name)
    assert go_on(run, runtime) == (6, {"at": 6}, prints[6])
    if (damage, name) == (remove, MANIFEST):
        # Without a manifest it never was a checkpoint.
        assert names(run) == ["step-00000003", "step-00000006", "step-00000008"]
        return
    assert [name in record.message for record in caplog.records if record.levelno >= 30] == [True]
    # It is set aside: neither counted nor kept in place of the good one.
    assert names(run) == ["step-00000003", "step-00000006", "step-00000008.damaged"]


def test_a_checkpoint_under_another_steps_name_is_damaged(run, runtime, prints):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000009")
    assert go_on(run, runtime) == (8, {"at": 8}, prints[8])
    assert "step-00000009.damaged" in names(run)


def test_when_none_is_intact_training_stops(run, runtime):
    for path in checkpoint_steps(run / "checkpoints").values():
        flip_bit(path / "__0_0.distcp")
    with pytest.raises(ValueError, match="none of the 3 .* is intact"):
        go_on(run, runtime)


def test_what_a_kill_left_is_removed(run, runtime):
    (run / "checkpoints" / "step-00000009.tmp").mkdir()
    assert go_on(run, runtime)[0] == 8
    assert names(run) == ["step-00000003", "step-00000006", "step-00000008"]


def test_evil_metadata_is_one_line_and_runs_nothing(run, runtime, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    rewrite_metadata(run / "checkpoints" / "step-00000008", pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"names posix.system, which is not allowed") as found:
        go_on(run, runtime)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "executed").exists()


def test_rollback_takes_the_newest_before_and_abandons_those_after(run, runtime, prints):
    assert go_back(run, runtime, 7) == (6, {"at": 6}, prints[6])
    assert names(run) == ["step-00000003", "step-00000006", "step-00000008.abandoned"]
    # Nor does a restart resume from what was abandoned.
    assert go_on(run, runtime) == (6, {"at": 6}, prints[6])
    assert go_back(run, runtime, 6)[0] == 6


def test_rollback_passes_over_a_damaged_one(run, runtime, prints):
    flip_bit(run / "checkpoints" / "step-00000006" / "__0_0.distcp")
    assert go_back(run, runtime, 6) == (3, {"at": 3}, prints[3])
    assert names(run) == [
        "step-00000003",
        "step-00000006.damaged",
        "step-00000008.abandoned",
    ]


def test_rollback_to_nothing_is_refused_and_changes_nothing(run, runtime):
    with pytest.raises(ValueError, match="holds none of step 2 or before"):
        go_back(run, runtime, 2)
    assert names(run) == ["step-00000003", "step-00000006", "step-00000008"]


def test_changes_of_the_configuration_are_named_field_by_field():
    old = {"steps": 3, "optim": {"lr": 0.1, "eps": 1.0}, "model": {"rope_scaling": None}, "b": 0}
    new = {"steps": 3, "optim": {"lr": 0.2, "eps": 1.0}, "model": {"rope_scaling": 8}, "a": 1}
    assert list(differences(old, new)) == [
        ("optim.lr", 0.1, 0.2),
        ("model.rope_scaling", None, 8),
        ("b", 0, ABSENT),
        ("a", ABSENT, 1),
    ]
    assert not list(differences(old, old))


@pytest.mark.parametrize(
    "field",
    ["name", "output_dir", "metrics.wandb", "checkpoint.keep_latest", "parallel.dp_replicate"]
    + [
        "data.path",
        "data.also",
        "data.microbatch_size",
        "early_exit.chunk_rows",
        "recovery.on_spike",
        "speculation.interval_steps",
    ],
)
def test_what_does_not_decide_the_result_may_change(field):
    assert is_harmless(field)


def test_every_source_may_be_found_elsewhere(run, runtime, caplog):
    caplog.set_level(logging.INFO)
    folder = run / "checkpoints" / "step-00000008"
    sources = {"path": "a/one", "also": ["a/two"]}
    edit_manifest(folder, lambda fields: fields["config"].update(data=sources))
    moved = {"path": "b/one", "also": ["b/two"]}
    assert go_on(run, runtime, data=moved)[0] == 8
    assert "config: data.also was ['a/two'], is ['b/two'] from step 8 on" in caplog.messages


@pytest.mark.parametrize(
    "field",
    ["seed", "steps", "data.seq_len", "data.global_batch_size", "optim.lr", "curriculum.R"]
    + ["layer_dropout.p_max", "early_exit.e_scale", "parallel.param_dtype", "parallel.float8"]
    + ["parallel.reduce_dtype", "metricsy", "names"],
)
def test_what_decides_the_result_may_not(field):
    assert not is_harmless(field)


def test_changes_that_decide_the_result_are_refused_together(run, runtime, caplog):
    changes = {"steps": 9, "optim": {"lr": 0.5}, "name": "other", "added": 1}
    with pytest.raises(ValueError, match="steps: was 8, is 9") as found:
        go_on(run, runtime, **changes)
    lines = str(found.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["steps", "optim.lr"]
    assert "give --steps 8 to go on as before, or --steps 9 to change it from step 8" in lines[0]
    assert "--checkpoint.allow_config_changes True" in lines[1]
    caplog.clear()
    caplog.set_level(logging.INFO, "train.checkpoints.compatibility")
    assert go_on(run, runtime, allow_config_changes=True, **changes)[0] == 8
    printed = [message for message in caplog.messages if message.startswith("config: ")]
    assert printed == [
        "config: name was tiny, is other from step 8 on",
        "config: steps was 8, is 9 from step 8 on",
        "config: optim.lr was 0.01, is 0.5 from step 8 on",
        "config: added is new, 1 from step 8 on",
    ]


@pytest.mark.parametrize("kind", ["tokenizer_fingerprint", "data_fingerprint"])
def test_another_tokenizer_or_dataset_is_always_refused(run, runtime, kind):
    other = hashlib.sha256(b"another of the same size").hexdigest()
    edit_manifest(
        run / "checkpoints" / "step-00000008", lambda fields: fields.update({kind: other})
    )
    with pytest.raises(ValueError, match=f"was trained on other data .{kind}"):
        go_on(run, runtime, allow_config_changes=True)


@pytest.mark.parametrize(("field", "value"), [("n_layers", 1), ("n_layers", 3), ("vocab_size", 60)])
def test_another_shape_is_always_refused(run, runtime, field, value):
    edit_manifest(
        run / "checkpoints" / "step-00000008", lambda fields: fields["model"].update({field: value})
    )
    with pytest.raises(ValueError, match=f"is of another model, with model.{field} {value}"):
        go_on(run, runtime, allow_config_changes=True)


def test_a_new_run_takes_the_weights_of_another(run, runtime, finished):
    model, _ = tiny.build(runtime)
    load_initial_weights(str(run), model, runtime=runtime)
    expected, optimizer = tiny.build(runtime)
    tiny.train(expected, optimizer, 0, 8)
    for name, value in expected.state_dict().items():
        assert value.to_local().equal(model.state_dict()[name].to_local()), name


def test_damaged_initial_weights_are_refused(run, runtime):
    flip_bit(run / "checkpoints" / "step-00000008" / "__0_0.distcp")
    model, _ = tiny.build(runtime)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        load_initial_weights(str(run), model, runtime=runtime)


def test_another_optimizers_moments_are_refused_before_its_configuration(run, runtime, tmp_path):
    model, optimizer = tiny.build(runtime, optim="muon")
    with pytest.raises(
        ValueError, match="optim.name: .*step-00000008 is of another optimizer, with"
    ):
        tiny.load_newest(run, model, optimizer, runtime, allow=True)
    tiny.train(model, optimizer, 0, 1)
    with tiny.writer(tmp_path, model, optimizer, runtime) as writer:
        writer.save(1, {})
    with pytest.raises(ValueError, match="with state.layers.0.attention.wk.weight.momentum_buffer"):
        go_on(tmp_path, runtime, optim={"lr": 0.02})


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_run_in_two_parts_ends_in_the_same_bits(runtime, tmp_path, optim):
    straight = tiny.build(runtime, optim=optim)
    tiny.train(*straight, 0, 8)
    begun = tiny.build(runtime, optim=optim)
    tiny.train(*begun, 0, 3)
    with tiny.writer(tmp_path, *begun, runtime) as writer:
        writer.save(3, {})
    resumed = tiny.build(runtime, optim=optim)
    assert tiny.load_newest(tmp_path, *resumed, runtime).t == 3
    tiny.train(*resumed, 3, 8)
    assert tiny.fingerprint(*resumed) == tiny.fingerprint(*straight)


def take_two_more(runtime, root, expected, parallel, optim):
    """Go on from the newest checkpoint, which must be as it was written, and write the next."""
    model, optimizer = tiny.build(runtime, optim=optim, **parallel)
    found = tiny.load_newest(root, model, optimizer, runtime)
    if expected is not None:
        assert tiny.fingerprint(model, optimizer) == expected
    tiny.train(model, optimizer, found.t, found.t + 2)
    with tiny.writer(root, model, optimizer, runtime) as writer:
        writer.save(found.t + 2, {})
    print_ = tiny.fingerprint(model, optimizer)
    if runtime.is_main:
        (root / "fingerprint").write_text(print_)


@pytest.mark.parametrize(("optim", "atol"), [("adamw", 1e-7), ("muon", 1e-4)])
def test_training_goes_on_at_another_world_size_and_mesh(tmp_path, runtime, optim, atol):
    # HSDP 2 x 2, FSDP over 2, one alone and plain, and 2 that each hold plain weights.
    run_distributed(take_two_more, 4, tmp_path, None, {"dp_replicate": 2}, optim)
    for ranks, parallel in ((2, {}), (1, {"shard": "none"}), (2, {"shard": "none"})):
        expected = (tmp_path / "fingerprint").read_text()
        if ranks == 1:
            take_two_more(runtime, tmp_path, expected, parallel, optim)
        else:
            run_distributed(take_two_more, ranks, tmp_path, expected, parallel, optim)
    newest = list(checkpoint_steps(tmp_path / "checkpoints").values())
    assert [read_manifest(path).world_size for path in newest] == [2, 1, 2]
    # Fused AdamW rounds the last elements of a shard otherwise than those in whole vectors, and
    # Muon may round what it orthogonalises otherwise, to bfloat16.
    model, optimizer = tiny.build(runtime, optim=optim)
    tiny.train(model, optimizer, 0, 8)
    expected = training_tensors(model, optimizer)
    model, optimizer = tiny.build(runtime, optim=optim)
    tiny.load_newest(tmp_path, model, optimizer, runtime)
    torch.testing.assert_close(training_tensors(model, optimizer), expected, rtol=1e-5, atol=atol)


def choose_with_damage(runtime, run):
    """Each rank verifies a share of the files; what one finds, all return."""
    path, manifest = newest_intact(run / "checkpoints", runtime)
    assert (path.name, manifest.step) == ("step-00000006", 6)


def test_damage_that_one_rank_finds_is_known_to_all(run):
    # Sorted, the files are .metadata, __0_0.distcp, tokenizer.model: rank 1 reads the shard.
    flip_bit(run / "checkpoints" / "step-00000008" / "__0_0.distcp")
    run_distributed(choose_with_damage, 2, run)
    assert "step-00000008.damaged" in names(run)
