"""A checkpoint is whole and verified, or it is not used."""

import json
import os
import pickle
import shutil

import pytest
import torch

from models.checkpoint_format import (
    checkpoint_steps,
    file_entry,
    find_checkpoint,
    load_model,
    verify,
)
from tests.train.conftest import Training
from train.checkpointer import differences, newest_intact


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Return the run folder of a short training with checkpoints at steps 3, 6 and 8."""
    training = Training(corpus, tmp_path_factory.mktemp("runs"))
    status, output = training.run(name="run")
    assert status == 0, output
    return training.output / "run"


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of that run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit, cut, remove])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "tokenizer.model"])
def test_damage_is_found_and_the_next_older_is_taken(run, damage, name):
    folder = run / "checkpoints"
    assert newest_intact(folder)[0].name == "step-00000008"
    damage(folder / "step-00000008" / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        verify(folder / "step-00000008")
    path, manifest = newest_intact(folder)
    assert (path.name, manifest.step) == ("step-00000006", 6)
    # The damaged one is set aside: neither counted nor kept in place of the good one.
    assert list(checkpoint_steps(folder)) == [3, 6]
    assert (folder / "step-00000008.damaged").is_dir()


def test_when_none_is_intact_training_stops(run):
    for path in checkpoint_steps(run / "checkpoints").values():
        flip_bit(path / "__0_0.distcp")
    with pytest.raises(ValueError, match="none of the 3 .* is intact"):
        newest_intact(run / "checkpoints")


def test_changes_of_the_configuration_are_named_field_by_field():
    old = {"steps": 3, "optim": {"lr": 0.1, "eps": 1.0}, "model": {"rope_scaling": None}}
    new = {"steps": 3, "optim": {"lr": 0.2, "eps": 1.0}, "model": {"rope_scaling": {"factor": 8}}}
    assert list(differences(old, new)) == [
        "optim.lr was 0.1, is 0.2",
        "model.rope_scaling was None, is {'factor': 8}",
    ]
    assert not list(differences(old, old))


@pytest.mark.parametrize("content", ["[]", "{}", "torn", '{"format": 1, "step": 1}', "\udcff"])
def test_what_is_no_manifest_is_named_and_passed_over(run, content):
    manifest = run / "checkpoints" / "step-00000008" / "manifest.json"
    manifest.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        verify(manifest.parent)
    assert newest_intact(run / "checkpoints")[0].name == "step-00000006"


def test_a_file_the_manifest_does_not_list_is_not_trusted(run):
    checkpoint = find_checkpoint(run)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["__0_0.distcp"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"__0_0\.distcp is not listed"):
        verify(checkpoint)


def test_an_unfinished_checkpoint_is_no_checkpoint(run):
    (run / "checkpoints" / "step-00000009.tmp").mkdir()
    (run / "checkpoints" / "step-00000010").mkdir()
    assert find_checkpoint(run).name == "step-00000008"


def test_loading_executes_no_code(run, tmp_path):
    checkpoint = find_checkpoint(run)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][".metadata"] = file_entry(checkpoint / ".metadata")  # all his own work
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"names posix.system, which is not allowed"):
        load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert not (tmp_path / "executed").exists()


def test_a_manifest_of_another_depth_does_not_load_half_a_model(run):
    checkpoint = find_checkpoint(run)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["model"]["n_layers"] = 3
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"does not fit the model.*layers\.3"):
        load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    manifest["model"] |= {"n_layers": 4, "ffn_dim": 40}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"does not fit the model.*feed_forward"):
        load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
