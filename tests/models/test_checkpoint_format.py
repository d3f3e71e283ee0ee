"""What a checkpoint folder may hold: verified before it is read, and read without running code."""

import json
import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from models.checkpoint_format import (
    MANIFEST,
    check_content,
    check_listing,
    checkpoint_steps,
    file_entry,
    find_checkpoint,
    load_model,
    read_manifest,
    verify,
)
from models.tensor_reader import TensorReader
from tests.train import tiny
from train.parallel.runtime import RuntimeConfig, start_runtime


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a run folder with one checkpoint, of step 3."""
    root = tmp_path_factory.mktemp("run")
    with start_runtime(RuntimeConfig(), seed=0) as runtime:
        model, optimizer = tiny.build(runtime)
        tiny.train(model, optimizer, 0, 3)
        with tiny.writer(root, model, optimizer, runtime) as writer:
            writer.save(3, {"seen": 5})
    return root


@pytest.fixture
def checkpoint(written, tmp_path):
    """Return a copy of it, to be damaged."""
    shutil.copytree(written, tmp_path / "run")
    return find_checkpoint(tmp_path / "run")


def edit_manifest(checkpoint, edit):
    """Change the manifest as an attacker may, to whom a missing sha256 means an older version."""
    fields = json.loads((checkpoint / MANIFEST).read_text())
    fields.pop("sha256", None)
    edit(fields)
    (checkpoint / MANIFEST).write_text(json.dumps(fields))


def load(checkpoint):
    return load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)


def test_an_intact_checkpoint_verifies_and_loads(checkpoint):
    assert (verify(checkpoint).step, verify(checkpoint).state) == (3, {"seen": 5})
    assert all(value.isfinite().all() for value in load(checkpoint).state_dict().values())


def test_a_changed_manifest_is_damaged(checkpoint):
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text.replace('"seen": 5', '"seen": 7'))
    with pytest.raises(ValueError, match="its sha256 is another"):
        verify(checkpoint)


def test_a_manifest_without_state_is_an_older_one(checkpoint):
    edit_manifest(checkpoint, lambda fields: fields.pop("state"))
    assert verify(checkpoint).state == {}


def test_sizes_are_checked_without_reading_the_files(checkpoint):
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    manifest = check_listing(checkpoint)
    check_content(checkpoint, manifest, [".metadata"])
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged, sha256 was"):
        check_content(checkpoint, manifest, ["__0_0.distcp"])
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged, bytes was"):
        check_listing(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "torn",
        '{"format": 1, "step": 1}',
        "\udcff",
        '{"format": 2}',
    ],
)
def test_what_is_no_manifest_is_named(checkpoint, content):
    manifest = checkpoint / MANIFEST
    manifest.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        verify(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "3"), ("state", []), ("files", {"a": {"bytes": 1}}), ("files", []), ("model", None)],
)
def test_a_manifest_of_wrong_types_is_no_manifest(checkpoint, key, value):
    edit_manifest(checkpoint, lambda fields: fields.update({key: value}))
    with pytest.raises(ValueError, match="is no manifest of format 1"):
        read_manifest(checkpoint)


def test_a_file_the_manifest_does_not_list_is_not_trusted(checkpoint):
    edit_manifest(checkpoint, lambda fields: fields["files"].pop("__0_0.distcp"))
    with pytest.raises(ValueError, match=r"__0_0\.distcp is not listed"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", ""])
def test_a_manifest_cannot_point_outside_its_folder(checkpoint, name):
    entry = {"bytes": 1, "sha256": "0"}
    edit_manifest(checkpoint, lambda fields: fields["files"].update({name: entry}))
    with pytest.raises(ValueError, match="which is outside the folder"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["__0_0.distcp", MANIFEST])
def test_a_link_is_refused(checkpoint, tmp_path, name):
    (checkpoint / name).rename(tmp_path / name)
    (checkpoint / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match="is a link"):
        verify(checkpoint)


def rewrite_metadata(checkpoint, content):
    """Put other metadata there and list it in the manifest, as an attacker would."""
    path = checkpoint / ".metadata"
    path.write_bytes(content)
    edit_manifest(
        checkpoint, lambda fields: fields["files"].update({".metadata": file_entry(path)})
    )


def test_loading_executes_no_code(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    rewrite_metadata(checkpoint, pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"names posix.system, which is not allowed"):
        load(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_memory_formats_are_read_as_early_python_3_11_names_them(checkpoint, monkeypatch):
    def named(member, protocol):
        return getattr, (type(member), member.name)

    expected = TensorReader(checkpoint).read_metadata()
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", named)
    content = pickle.dumps(expected)
    assert b"getattr" in content
    rewrite_metadata(checkpoint, content)
    found = TensorReader(checkpoint).read_metadata()
    assert found.state_dict_metadata == expected.state_dict_metadata
    load(checkpoint)


@pytest.mark.parametrize(
    ("of", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (1, ["real"])]
)
def test_no_other_attribute_is_read(checkpoint, of, name):
    class Evil:
        def __reduce__(self):
            return getattr, (of, name)

    rewrite_metadata(checkpoint, pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"(getattr, which is not allowed|is damaged)"):
        load(checkpoint)


def test_metadata_cannot_point_outside_its_folder(checkpoint):
    metadata = TensorReader(checkpoint).read_metadata()
    storage = next(iter(metadata.storage_data.values()))
    storage.relative_path = "../../other/" + storage.relative_path
    rewrite_metadata(checkpoint, pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"points to '\.\./\.\./other"):
        load(checkpoint)


def test_a_manifest_of_another_depth_does_not_load_half_a_model(checkpoint):
    edit_manifest(checkpoint, lambda fields: fields["model"].update(n_layers=1))
    with pytest.raises(ValueError, match=r"does not fit the model.*layers\.1"):
        load(checkpoint)
    edit_manifest(checkpoint, lambda fields: fields["model"].update(n_layers=2, ffn_dim=40))
    with pytest.raises(ValueError, match=r"does not fit the model.*feed_forward"):
        load(checkpoint)


def test_an_unfinished_checkpoint_is_no_checkpoint(checkpoint):
    folder = checkpoint.parent
    for name in ("step-00000009.tmp", "step-00000010", "step-00000011.damaged", "astep-00000012"):
        (folder / name).mkdir()
    (folder / "step-00000011.damaged" / MANIFEST).touch()
    assert checkpoint_steps(folder) == {3: checkpoint}
    assert {find_checkpoint(path) for path in (folder, folder.parent, checkpoint)} == {checkpoint}


def test_a_run_whose_checkpoints_are_elsewhere_names_their_folder(tmp_path):
    config = {"name": "far", "checkpoint": {"folder": "s3://bucket/runs"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"keeps its checkpoints in s3://bucket/runs/far, na"):
        find_checkpoint(tmp_path)
