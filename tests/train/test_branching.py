"""What may change when a run resumes or branches off another, and what it then reads."""

import json
import logging
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest

from data.mixture import Mixture
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from models.checkpoint_format import Manifest, read_manifest
from tests.conftest import ROOT
from tests.faults.state import fingerprint, records
from tests.models.test_checkpoint_format import edit_manifest
from tests.train import tiny
from tests.training import Training
from train import main as command
from train.checkpoints.resume import Resumed
from train.loop.corpus import open_corpus
from train.loop.data_config import DataConfig
from train.loop.recovery import RecoveryConfig, skip_after_rollback
from train.loop.run_state import RunState
from train.main import main
from train.resumed_rows import (
    checkpoint_state,
    resumed_state,
    warn_of_another_seed,
    with_reading,
)

OFTEN = {"metrics__interval_steps": 1, "validate__interval_steps": 0, "checkpoint__keep_latest": 0}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Return the folder of a finished run `x` of 8 steps of a stable rate, with those before."""
    folder = tmp_path_factory.mktemp("stable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "start_logging", lambda: None)
        training = Training(corpus, folder / "outputs")
        stable = {"optim__schedule": "wsd", "optim__decay_fraction": 0}
        assert main(training.arguments(name="x", **OFTEN, **stable)) == 0
    return folder / "outputs"


@pytest.fixture(scope="module")
def other_corpus(corpus, tmp_path_factory):
    """Return a dataset of other text and the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "tokens"
    inputs = (str(ROOT / "data"),)
    tokenizer = corpus / "tokenizer.model"
    prepare(PrepareConfig(input=inputs, tokenizer=tokenizer, validation_fraction=0.2), folder)
    return folder


class Runs:
    """Runs in this process, the rows they read, and the source and position of each token."""

    def __init__(self, training):
        self.training = training
        self.rows = []
        self.tokens = []

    def run(self, *, name="x", **changes):
        schedule = {"optim__schedule": "wsd", "optim__decay_fraction": 0}
        return main(self.training.arguments(name=name, **(OFTEN | schedule | changes)))

    @property
    def x(self):
        return self.training.output / "x"


@pytest.fixture
def runs(training, trained, monkeypatch, caplog):
    """Return a copy of that run, to go on with."""
    monkeypatch.setattr(command, "start_logging", lambda: None)
    caplog.set_level(logging.INFO)
    shutil.copytree(trained, training.output)
    found, read = Runs(training), Mixture.read

    def spy(mixture, rows):
        source, window = mixture.locate(rows)
        found.rows += rows.tolist()
        for s, i in zip(source.tolist(), window.tolist(), strict=True):
            begins, ends = mixture.sources[s].spans()
            found.tokens += [(s, position) for position in range(begins[i], ends[i])]
        return read(mixture, rows)

    monkeypatch.setattr(Mixture, "read", spy)
    return found


def test_a_branch_of_the_same_configuration_ends_in_the_same_weights_and_moments(runs, capsys):
    branch = {"name": "y", "checkpoint__resume_from": runs.x, "checkpoint__step": 3}
    assert runs.run(**branch) == 0
    assert runs.rows == list(range(24, 64))
    y = runs.training.output / "y"
    assert fingerprint(y) == fingerprint(runs.x)
    # The same command again resumes the branch itself, also where the run it left is gone.
    shutil.rmtree(runs.x)
    assert runs.run(**branch) == 0
    assert runs.run(name="y", steps=9) == 0
    assert runs.rows == list(range(24, 72))
    assert read_manifest(y / "checkpoints" / "step-00000009").state["origin"] == [str(runs.x), 3]
    # But not that of another origin.
    assert runs.run(**branch | {"checkpoint__step": 6}) == 2
    assert runs.run(name="y", checkpoint__resume_from="outputs/z") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(f"{y} began off step 3 of {runs.x} and has done 9" in line for line in errors)


def test_a_decay_branches_off_a_stable_rate(runs):
    decay = {"optim__decay_fraction": 0.5, "optim__min_lr_ratio": 0, "steps": 6}
    assert runs.run(name="y", checkpoint__resume_from=runs.x, checkpoint__step=3, **decay) == 0
    rates = [r["optim/lr"] for r in records(runs.training.output / "y") if "optim/lr" in r]
    assert rates == pytest.approx([3e-3 * 2 / 3, 3e-3 / 3, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint__step": 4}, "checkpoint.step: 4, but {x} holds the steps 3, 6, 8, name one"),
        ({"checkpoint__resume_from": "gone"}, "checkpoint.resume_from: gone holds no finished"),
        ({"checkpoint__init_from": "a"}, "checkpoint.init_from: a, but checkpoint.resume_from is"),
        ({"name": "x"}, "checkpoint.resume_from: {x}, but {x} began at step 0 and has done 8"),
        ({"steps": 8}, "steps: 8, but 8 are done, give more"),
        ({"model__dim": 32}, "name: {x}/checkpoints/step-00000008 is of another model"),
        ({"optim__name": "muon"}, "optim.name: {x}/checkpoints/step-00000008 is of another opti"),
    ],
)
def test_what_cannot_branch_is_one_line(runs, capsys, changes, message):
    branch = {"name": "y", "checkpoint__resume_from": runs.x, "steps": 9}
    assert runs.run(**branch | changes) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(x=runs.x)}")


def test_rows_go_on_at_other_batches_windows_and_sources(runs, other_corpus, caplog):
    changes = [
        {"steps": 10, "data__global_batch_size": 4},
        {"steps": 12, "data__global_batch_size": 6, "data__microbatch_size": 3},
        {"steps": 13, "data__seq_len": 8},
        {"steps": 15, "data__also": other_corpus, "data__weights": "0.5 0.5"},
        {"steps": 16, "data__also": None, "data__weights": None},
    ]
    given = {}
    for change in changes:
        given |= change
        assert runs.run(**given) == 0
    assert runs.rows == list(range(64, 64 + 8 + 12 + 6 + 12 + 6))
    assert "config: data.global_batch_size was 8, is 4 from step 8 on" in caplog.messages
    # The windows of step 12 on are halves of those before: no token is read twice.
    assert len(set(runs.tokens)) == len(runs.tokens) == 20 * 16 + 24 * 8
    assert {source for source, _ in runs.tokens} == {0, 1}
    state = read_manifest(runs.x / "checkpoints" / "step-00000016").state
    assert (state["rows"], state["tokens"]) == (108, 84 * 16 + 24 * 8)
    assert len(state["reading"]["absent"]) == 1


def test_a_recipe_changes_with_the_flag_alone_and_nothing_by_a_forgotten_option(runs, capsys):
    assert runs.run(steps=9, layer_dropout__p_max=0.1, early_exit__e_scale=0.3) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " layer_dropout.p_max",
        " early_exit.e_scale",
    ]
    tokens = {"steps": 12, "tokens": 12 * 16 * 8, "data__global_batch_size": 4}
    del runs.training.fields["steps"], tokens["steps"]
    assert runs.run(**tokens) == 2
    assert capsys.readouterr().err.startswith(
        "error: tokens: 1,024 were read in 8 steps, of another size than the 64 now, give --steps "
        "16 in place of --tokens"
    )
    assert runs.run(steps=7) == 2
    assert capsys.readouterr().err.startswith("error: steps: 7, but 8 are done, give at least")
    del runs.training.fields["data.seq_len"]
    assert runs.run(model__max_seq_len=256) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: steps: was 8, is 500, give --steps 8 to go on as before, or --steps 500 to change "
        "it from step 8 on",
        "error: data.seq_len: was 16, is 256, give --data.seq_len 16 to go on as before, or "
        "--data.seq_len 256 to change it from step 8 on",
    ]
    assert runs.rows == []


def test_a_context_grows_on_resuming_and_from_given_weights(runs, caplog):
    longer = {"model__max_seq_len": 64, "data__seq_len": 64, "data__global_batch_size": 2}
    longer["data__microbatch_size"] = 1
    assert runs.run(steps=9, **longer) == 0
    assert read_manifest(runs.x / "checkpoints" / "step-00000009").model.max_seq_len == 64
    assert runs.run(name="y", steps=1, checkpoint__init_from=runs.x, model__max_seq_len=128) == 0
    assert (
        "checkpoint: they were trained with a context of 64 tokens, and go on with 128"
        in caplog.messages
    )


def test_a_checkpoint_of_version_0_1_goes_on_at_its_step_times_its_batch(runs):
    whole = fingerprint(runs.x)
    for step in (6, 8):
        shutil.rmtree(runs.x / "checkpoints" / f"step-0000000{step}")
    folder = runs.x / "checkpoints" / "step-00000003"

    def as_of_0_1(fields):
        state = fields["state"]
        for name in ("rows", "tokens", "skipped_rows", "reading", "origin"):
            del state[name]
        state["skipped_batches"] = []

    edit_manifest(folder, as_of_0_1)
    aside = shutil.copytree(runs.x, runs.training.output / "z")
    assert runs.run() == 0
    assert fingerprint(runs.x) == whole
    assert runs.rows == list(range(24, 64))
    # With other batches and windows, too.
    runs.rows.clear()
    assert runs.run(name=aside.name, steps=5, data__global_batch_size=4, data__seq_len=32) == 0
    assert runs.rows == list(range(24, 32))


def test_rows_skipped_by_a_rollback_stay_skipped_at_another_batch_size(runs):
    shutil.rmtree(runs.x / "checkpoints" / "step-00000008")
    event = {"time": 1.0, "kind": "rollback", "step": 8, "to": 6, "reason": "a spike"}
    with (runs.x / "events.jsonl").open("a") as file:
        file.write(json.dumps(event | {"skipped": [6, 9]}) + "\n")  # batches, as version 0.1
        file.write(json.dumps(event | {"skipped_rows": [73, 75]}) + "\n")
    other = {"data__global_batch_size": 4, "steps": 8, "data__seq_len": 8}
    assert runs.run(**other) == 0
    assert len(set(runs.tokens)) == len(runs.tokens) == 8 * 8
    # A mixture of other windows begins beyond all rows that are skipped.
    assert np.diff(runs.rows).tolist() == [1] * 7
    assert runs.rows[0] == 75


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"skipped_rows": [0, 2**70]},
        {"skipped_rows": [0]},
        {"skipped": "ab"},
        {"skipped_rows": [0, 2], "reading": {"sources": 1}},
    ],
)
def test_a_rollback_that_cannot_be_read_is_left_out(caplog, fields):
    event = {"time": 1.0, "kind": "rollback", "step": 8, **fields}
    state = resumed_state(Resumed(0, {}), [event], DataConfig(global_batch_size=4))
    assert state == RunState()
    assert "the rollback from step 8 cannot be read" in caplog.text


def test_another_seed_is_reported_with_what_it_costs(caplog):
    caplog.set_level("INFO")
    manifest = Manifest(
        step=5, model=tiny.MODEL, config={"seed": 0}, tokenizer_fingerprint="",
        data_fingerprint="", world_size=1, versions={}, files={},
    )  # fmt: skip
    warn_of_another_seed(Resumed(5, {}, manifest), 0)
    assert not caplog.text
    warn_of_another_seed(Resumed(5, {}, manifest), 1)
    assert "data: seed was 0, is 1" in caplog.text


def test_a_rollback_past_a_change_of_windows_skips_the_rows_of_both(corpus):
    """The rows after the checkpoint are of the mixture that was rolled back from."""
    config = DataConfig(path=str(corpus), seq_len=8, global_batch_size=4)
    opened = open_corpus(config, 400)
    before = opened.unread(replace(config, seq_len=16))
    stored = RunState(rows=40, tokens=640, reading=before)
    manifest = Manifest(
        step=5, model=tiny.MODEL, config={"data": {"global_batch_size": 8, "seq_len": 16}},
        tokenizer_fingerprint="", data_fingerprint="", world_size=1, versions={}, files={},
    )  # fmt: skip
    resumed = Resumed(5, stored.as_dict(), manifest)
    changed = with_reading(stored, resumed, opened, config, seed=0)
    assert changed.next_row == changed.reading.start == 40
    later = replace(changed, rows=80)
    back = later.back_at(checkpoint_state(resumed))
    skipped = skip_after_rollback(back.next_row, later.last_row, 4, RecoveryConfig(skip_batches=2))
    assert skipped == (40, 80)
    goes_on = back.skipping([skipped])
    assert (goes_on.rows, goes_on.next_row) == (40, 80)
    # A restart from that checkpoint, before the next one is written, goes on at the same tokens.
    event = {"kind": "rollback", "skipped_rows": skipped, "reading": asdict(later.reading)}
    event = json.loads(json.dumps(event))
    restarted = resumed_state(resumed, [event], config)
    restarted = with_reading(restarted, resumed, opened, config, seed=0)
    assert restarted == goes_on
    # Also where the windows are changed back.
    wide = replace(config, seq_len=16)
    again = with_reading(resumed_state(resumed, [event], wide), resumed, opened, wide, seed=0)
    assert again.next_row == 80
    [source] = again.reading.sources
    assert [(s.seq_len, s.turns) for s in source.stretches] == [(16, 40), (8, 40), (16, 0)]
