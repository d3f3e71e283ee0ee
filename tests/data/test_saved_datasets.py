"""Rows of a Hugging Face dataset are documents; what does not exist is one line."""

import logging

import pytest

from data.faults import Faults
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.row_layout import RowLayout
from data.sources.documents import read_documents
from tests.documents import make_documents

datasets = pytest.importorskip("datasets")
TEXTS = make_documents(30)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    one = datasets.Dataset.from_dict({"id": list(range(30)), "text": TEXTS})
    one.save_to_disk(root / "one", num_shards=3)
    datasets.Dataset.from_dict({"text": TEXTS}, split="odd").save_to_disk(root / "named")
    odd = datasets.Dataset.from_dict({"text": ["a", None, " ", "b\0"]})
    datasets.DatasetDict({"train": one, "odd": odd}).save_to_disk(root / "dict")
    one.to_parquet(root / "hub" / "data.parquet")
    return root


def read(source, text_field="text"):
    faults = Faults()
    return list(read_documents([source], faults, RowLayout(text_field))), faults


@pytest.mark.parametrize("name", ["one", "one:train", "dict", "dict:train", "named", "named:odd"])
def test_rows_come_in_their_order(saved, name):
    documents, faults = read(f"hf:{saved / name}")
    assert [document.text for document in documents] == TEXTS
    assert documents[4].origin == f"hf:{saved / name}:5"
    assert not faults.counts


def test_a_saved_folder_is_found_by_its_path_alone_and_below_a_folder(saved, tmp_path):
    for given in ("one", "dict", "dict/train", "o*e", "named"):
        documents, faults = read(str(saved / given))
        assert [document.text for document in documents] == TEXTS
        assert not faults.counts
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("last")
    (saved / "one").rename(tmp_path / "in" / "a" / "one")
    documents, faults = read(str(tmp_path / "in"))
    (tmp_path / "in" / "a" / "one").rename(saved / "one")
    assert [document.text for document in documents] == [*TEXTS, "last"]
    assert documents[0].origin == f"{tmp_path}/in/a/one:1"
    assert not faults.counts
    (saved / "dict").rename(saved / "splits")
    (saved / "splits" / "train").rename(saved / "splits" / "gone")
    description = saved / "splits" / "dataset_dict.json"
    whole = description.read_text()
    description.write_text('{"splits": ["odd"]}')
    with pytest.raises(ValueError, match=r"splits has no split train, give hf:.*:SPLIT, one of: o"):
        read(str(saved / "splits"))
    description.write_text(whole)
    (saved / "splits" / "gone").rename(saved / "splits" / "train")
    (saved / "splits").rename(saved / "dict")


def test_a_name_of_the_hub_is_streamed(saved, monkeypatch):
    def hub(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("a/b", "small", "test", True)
        return original(str(saved / "hub"), split="train", streaming=True)

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", hub)
    documents, _ = read("hf:a/b:test:small")
    assert [document.text for document in documents] == TEXTS


def test_rows_without_text_are_counted_with_their_place(saved):
    documents, faults = read(f"hf:{saved / 'dict'}:odd")
    assert [document.text for document in documents] == ["a"]
    assert faults.counts == {
        "field 'text' is not a string": 1,
        "empty document": 1,
        "NUL character": 1,
    }
    assert faults.examples["empty document"] == [f"hf:{saved / 'dict'}:odd:3"]


def test_a_dataset_is_prepared_from_it(saved, tmp_path):
    config = PrepareConfig(input=(f"hf:{saved / 'one'}",), vocab_size=300, validation_fraction=0.2)
    dataset = prepare(config, tmp_path / "data", workers=1)
    assert sum(split.documents for split in dataset.splits.values()) == 30


@pytest.mark.parametrize(
    ("source", "field", "reason"),
    [
        ("hf:", "text", "names no dataset, give hf:NAME"),
        ("hf:{}/dict:absent", "text", "no split absent, give hf:.*:SPLIT, one of: train, odd"),
        ("hf:{}/one:absent", "text", "saved as one split, train, give that or none"),
        ("hf:{}/named:train", "text", "saved as one split, odd, give that or none"),
        ("hf:{}/one::small", "text", "which has no CONFIG"),
        ("hf:{}/one", "body", "body is no column of .* give one of: text"),
        ("hf:{}", "text", "cannot be opened"),
    ],
)
def test_what_is_not_there_is_said(saved, source, field, reason):
    with pytest.raises(ValueError, match=reason):
        read(source.format(saved), field)


@pytest.mark.parametrize("name", ["/no/folder", "./folder", "../folder", "~/folder", "a/b/c", "a/"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=f"input hf:{name} cannot be .*no such folder.*, give a "):
        read(f"hf:{name}")


def test_retries_of_the_hub_are_not_heard(monkeypatch, caplog):
    logger = logging.getLogger("huggingface_hub.utils")

    def hub(*arguments, **options):
        logger.warning("Retrying in 1s")
        raise ConnectionError("not reached")

    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(ValueError, match="input hf:a/b cannot be opened .not reached., give a fol"):
        read("hf:a/b")
    assert not caplog.records
    logger.warning("of something else")
    assert len(caplog.records) == 1
