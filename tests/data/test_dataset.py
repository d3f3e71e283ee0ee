import dataclasses
import json
from pathlib import Path

import pytest

from data.dataset import Dataset, open_dataset, write_description
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.tokenizer import train_tokenizer


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_path: Path, documents: list[str]) -> Dataset:
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = PrepareConfig(
        input=(str(source),), tokenizer=tokenizer_path, validation_fraction=0.2, shard_tokens=1000
    )
    return prepare(config, tmp_path / "dataset", workers=1)


def test_description_read_back_equals_the_one_written(dataset: Dataset) -> None:
    changed = {"duplicates": 3, "skipped": {"NUL character": 2}, "arguments": {"input": ["a"]}}
    written = dataclasses.replace(dataset, **changed)
    write_description(written)
    assert open_dataset(dataset.path) == written


def test_streams_have_the_tokens_that_the_description_says(dataset: Dataset) -> None:
    for name, split in dataset.splits.items():
        assert len(dataset.stream(name)) == split.tokens


def test_moved_dataset_keeps_its_fingerprint(dataset: Dataset, tmp_path: Path) -> None:
    before = dataset.fingerprint
    moved = dataset.path.rename(tmp_path / "elsewhere")
    assert open_dataset(moved).fingerprint == before


def test_fingerprint_changes_with_any_shard_or_the_tokenizer(dataset: Dataset) -> None:
    content = json.loads((dataset.path / "dataset.json").read_text())
    content["splits"]["validation"]["shards"][0]["sha256"] = "0" * 64
    (dataset.path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="changed by hand"):
        open_dataset(dataset.path)
    other = dataclasses.replace(dataset, tokenizer_fingerprint="0" * 64)
    assert other.fingerprint != dataset.fingerprint


def test_wrong_tokenizer_names_both_fingerprints(dataset: Dataset, documents: list[str]) -> None:
    train_tokenizer(documents, 310, dataset.tokenizer_path)
    with pytest.raises(
        ValueError, match=rf"has sha256 \w{{64}} .* {dataset.tokenizer_fingerprint}"
    ):
        open_dataset(dataset.path)


def test_shard_of_another_tokenizer_names_both_fingerprints(dataset: Dataset) -> None:
    path = dataset.path / dataset.splits["train"].shards[0].name
    other = "0" * 64
    old = dataset.tokenizer_fingerprint
    path.write_bytes(path.read_bytes().replace(old.encode(), other.encode(), 1))
    with pytest.raises(ValueError, match=f"{path.name} was made with tokenizer {other} .* {old}"):
        dataset.stream("train")


def test_shard_of_another_dataset_names_both_lengths(dataset: Dataset) -> None:
    first, second = dataset.splits["train"].shards[:2]
    assert first.tokens != second.tokens
    (dataset.path / second.name).replace(dataset.path / first.name)
    with pytest.raises(ValueError, match=f"has {second.tokens} tokens but .* lists {first.tokens}"):
        dataset.stream("train")


def test_folder_without_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no dataset.json, .*make one with python -m data"):
        open_dataset(tmp_path)


def test_a_file_is_no_dataset_its_folder_is(dataset: Dataset) -> None:
    for name in ("dataset.json", "tokenizer.model"):
        with pytest.raises(ValueError, match=f"{name} is a file, name its folder {dataset.path}$"):
            open_dataset(dataset.path / name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 9}', '{"format": 1}'])
def test_damaged_description_is_a_value_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged .*, prepare it again"):
        open_dataset(tmp_path)


def test_unknown_split_names_those_there_are(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"split test is not in .* \['train', 'validation'\]"):
        dataset.stream("test")
