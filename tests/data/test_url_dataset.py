"""Datasets by URL: prepared there, copied once, and the very bytes a path would have."""

import shutil
from collections import namedtuple

import pytest

from data.dataset import DESCRIPTION_NAME, verify_shards
from data.preparation import PrepareConfig, prepare
from data.url_dataset import dataset_at, prepare_at
from data.urls import Url, UrlError, cache_folder


@pytest.fixture
def config(documents, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(documents):
        (texts / f"{number:02d}.txt").write_text(text)
    return PrepareConfig(input=(str(texts),), vocab_size=320)


def test_a_dataset_prepared_by_url_is_that_of_a_path(config, memory, tmp_path, monkeypatch):
    local = prepare(config, tmp_path / "local", workers=1)
    there = prepare_at(config, memory / "data", workers=1)
    assert there.fingerprint == local.fingerprint
    files = {path.name: path.stat().st_size for path in local.path.iterdir()}
    assert (memory / "data").files() == files
    for name in files:
        assert (memory / "data" / name).read_bytes() == (local.path / name).read_bytes()
    assert [path.name for path in cache_folder().iterdir()] == ["datasets"]
    # Without its shards until they are asked for, and then copied once.
    assert not (there.path / "train-00000.tokens").exists()
    whole = dataset_at(memory / "data")
    verify_shards(whole)
    assert whole.path == there.path
    download = Url.download
    monkeypatch.setattr(Url, "download", None)
    assert dataset_at(memory / "data") == whole
    monkeypatch.setattr(Url, "download", download)
    # Again it is there, with other arguments it is refused, and replaced where that is asked for.
    assert prepare_at(config, memory / "data", workers=1) == whole
    other = PrepareConfig(input=config.input, vocab_size=330)
    with pytest.raises(ValueError, match="made with other arguments, give another --output"):
        prepare_at(other, memory / "data", workers=1)
    assert prepare_at(other, memory / "data", workers=1, overwrite=True).vocab_size == 330
    assert dataset_at(memory / "data").vocab_size == 330


@pytest.fixture
def dataset(corpus, memory):
    """Return the URL of a dataset."""
    for path in corpus.iterdir():
        (memory / path.name).upload(path)
    return memory


def test_a_dataset_that_is_damaged_or_missing_is_one_line(dataset):
    with pytest.raises(ValueError, match=f"dataset {dataset}/no/dataset.json does not exist, .*ma"):
        dataset_at(dataset / "no")
    shard = dataset / "train-00000.tokens"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UrlError, match=f"{shard} is damaged, sha256 was .*, use another"):
        dataset_at(dataset)
    assert not [*cache_folder().rglob("*.partial"), *cache_folder().rglob("train*")]
    shard.remove()
    with pytest.raises(ValueError, match=f"dataset {shard} does not exist"):
        dataset_at(dataset)
    (dataset / DESCRIPTION_NAME).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{dataset}/dataset.json is damaged"):
        dataset_at(dataset)


def test_a_disk_without_room_is_one_line_before_anything_is_copied(dataset, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**26 + 10))
    with pytest.raises(ValueError, match="a copy of .* needs .* GB, .* GB free, .*SKIPSTONE_CACHE"):
        dataset_at(dataset)
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written_is_one_line(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="Not a directory, set SKIPSTONE_CACHE to a folder"):
        dataset_at(dataset)


def test_a_folder_that_is_no_dataset_is_not_written_to(config, memory):
    (memory / "notes.txt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists and is no dataset, give another --output"):
        prepare_at(config, memory, workers=1)
    assert memory.files() == {"notes.txt": 4}
