import json
import random
from pathlib import Path

import pytest

from data.dataset import Dataset
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.stages import Preparation
from data.tokenizer import Tokenizer


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read_back(dataset: Dataset, split: str) -> list[str]:
    """Return the texts of a split: its stream cut at BOS and EOS, and decoded."""
    tokenizer = Tokenizer(dataset.tokenizer_path)
    stream = dataset.stream(split)
    texts, current = [], None
    for token in stream.read(0, len(stream)).tolist():
        if token == tokenizer.bos_id:
            assert current is None
            current = []
        elif token == tokenizer.eos_id:
            texts.append(tokenizer.decode(current))
            current = None
        else:
            current.append(token)
    assert current is None
    return texts


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_output_is_the_same_to_the_byte_for_any_number_of_workers(
    tmp_path: Path, documents: list[str]
) -> None:
    texts = [text * 40 for text in documents]  # More than one batch per worker.
    source = write_lines(tmp_path / "a.jsonl", texts)
    config = PrepareConfig(input=(source,), vocab_size=320, shard_tokens=50_000)
    for workers in (1, 2):
        prepare(config, tmp_path / f"out-{workers}", workers=workers)
    one, two = files(tmp_path / "out-1"), files(tmp_path / "out-2")
    assert one == two
    assert {"dataset.json", "tokenizer.model", "train-00002.tokens"} <= one.keys()


def test_every_document_comes_back_whole_in_exactly_one_split(
    tmp_path: Path, tokenizer_path: Path, documents: list[str]
) -> None:
    texts = random.Random(0).sample(documents * 2, k=2 * len(documents))
    source = write_lines(tmp_path / "a.jsonl", texts)
    config = PrepareConfig(
        input=(source,), tokenizer=tokenizer_path, validation_fraction=0.3, shard_tokens=500
    )
    dataset = prepare(config, tmp_path / "out", workers=1)
    train, validation = read_back(dataset, "train"), read_back(dataset, "validation")
    assert validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # In the order of the input.
    assert dataset.duplicates == len(documents)
    for name, split in (("train", train), ("validation", validation)):
        assert dataset.splits[name].documents == len(split)
        assert dataset.splits[name].text_bytes == sum(len(text.encode()) for text in split)


def test_adding_documents_moves_none_between_splits(
    tmp_path: Path, tokenizer_path: Path, documents: list[str]
) -> None:
    held_out = []
    for count in (30, 60):
        source = write_lines(tmp_path / f"{count}.jsonl", documents[:count])
        config = PrepareConfig(input=(source,), tokenizer=tokenizer_path, validation_fraction=0.3)
        held_out.append(
            read_back(prepare(config, tmp_path / f"out-{count}", workers=1), "validation")
        )
    assert held_out[0] == [text for text in held_out[1] if text in documents[:30]]


def test_second_call_finds_the_dataset_and_other_arguments_are_refused(
    tmp_path: Path, tokenizer_path: Path, documents: list[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", documents)
    config = PrepareConfig(input=(source,), tokenizer=tokenizer_path)
    first = prepare(config, tmp_path / "out", workers=1)
    stamp = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    assert prepare(config, tmp_path / "out", workers=1) == first
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == stamp
    other = PrepareConfig(input=(source,), tokenizer=tokenizer_path, validation_fraction=0.4)
    with pytest.raises(ValueError, match="made with other arguments, .* --overwrite"):
        prepare(other, tmp_path / "out", workers=1)
    again = prepare(other, tmp_path / "out", workers=1, overwrite=True)
    assert again.splits["validation"].documents > first.splits["validation"].documents


def test_folder_that_is_no_dataset_is_never_replaced(
    tmp_path: Path, tokenizer_path: Path, documents: list[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", documents)
    config = PrepareConfig(input=(source,), tokenizer=tokenizer_path)
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no dataset, give another --output"):
        prepare(config, precious.parent, workers=1, overwrite=True)
    assert precious.read_text() == "years of work"


def test_failed_run_leaves_the_old_dataset_and_nothing_half(
    tmp_path: Path,
    tokenizer_path: Path,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_lines(tmp_path / "a.jsonl", documents)
    config = PrepareConfig(input=(source,), tokenizer=tokenizer_path)
    prepare(config, tmp_path / "out", workers=1)
    before = files(tmp_path / "out")

    def fail(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(Preparation, "encode", fail)
    with pytest.raises(OSError, match="disk is full"):
        prepare(config, tmp_path / "out", workers=1, overwrite=True)
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_input_that_changes_between_the_passes_is_refused(
    tmp_path: Path,
    tokenizer_path: Path,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_lines(tmp_path / "a.jsonl", documents)
    survey = Preparation.survey

    def survey_then_write(preparation: Preparation) -> object:
        seen = survey(preparation)
        write_lines(tmp_path / "a.jsonl", [*documents, "late"])
        return seen

    monkeypatch.setattr(Preparation, "survey", survey_then_write)
    config = PrepareConfig(input=(source,), tokenizer=tokenizer_path)
    with pytest.raises(ValueError, match="input changed while it was read"):
        prepare(config, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_all_faults_of_a_config_are_named_at_once() -> None:
    config = PrepareConfig(input=(), validation_fraction=2, shard_tokens=0)
    with pytest.raises(ValueError, match="input: empty.*exactly one.*fraction 2.*shard_tokens 0"):
        prepare(config, Path("unused"))


def test_dropped_duplicates_are_in_no_split_for_any_number_of_workers(
    tmp_path: Path, tokenizer_path: Path, documents: list[str]
) -> None:
    texts = [text * 40 for text in random.Random(0).sample(documents * 3, k=3 * len(documents))]
    source = write_lines(tmp_path / "a.jsonl", texts)
    config = PrepareConfig(
        input=(source,), tokenizer=tokenizer_path, validation_fraction=0.3, duplicates="drop"
    )
    one, two = (prepare(config, tmp_path / f"out-{n}", workers=n) for n in (1, 2))
    assert files(one.path) == files(two.path)
    read = read_back(one, "train") + read_back(one, "validation")
    assert sorted(read) == sorted(set(texts))
    assert (one.duplicates, one.dropped_duplicates) == (len(texts) - len(read), True)
