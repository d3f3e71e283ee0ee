"""What is wrong with the shards of a dataset, or too little in them: named, or of no matter."""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.batch_ramp import BatchRamp
from data.dataset import Dataset, open_dataset, verify_shards, write_description
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.shards import HEADER_BYTES
from data.step_rows import StepRows
from tests.data.test_loader import make_loader
from tests.documents import make_documents
from tests.faults.test_data_faults import json_lines, prepared


@pytest.fixture(scope="module")
def model(tokenizer_path: Path) -> Path:
    """Return a tokenizer of 320 tokens."""
    return tokenizer_path


def split_dataset(tmp_path: Path, tokenizer: Path) -> Dataset:
    """Return a dataset of several shards."""
    source = tmp_path / "source.jsonl"
    source.write_bytes(b"".join(json_lines(make_documents(40))))
    return prepared(source, tokenizer, shard_tokens=1000, validation_fraction=0.2)


def failing_parts(dataset: Dataset, parts: int) -> dict[int, str]:
    """Verify as so many ranks would; return the messages of those that found something."""
    found = {}
    for part in range(parts):
        try:
            verify_shards(dataset, part=part, parts=parts)
        except ValueError as error:
            found[part] = str(error)
    return found


@pytest.mark.parametrize("parts", [1, 2, 3, 64])
def test_flipped_bit_of_a_shard_is_found_by_one_rank(
    tmp_path: Path, model: Path, parts: int
) -> None:
    dataset = split_dataset(tmp_path, model)
    assert failing_parts(dataset, parts) == {}
    path = dataset.path / dataset.splits["train"].shards[2].name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    opened = open_dataset(dataset.path)
    assert opened.fingerprint == dataset.fingerprint  # What a resume compares does not see it.
    found = failing_parts(opened, parts)
    assert list(found) == [2 % parts]
    assert f"shard {path}: its sha256 is" in found[2 % parts]
    assert dataset.splits["train"].shards[2].sha256 in found[2 % parts]


def test_id_outside_the_vocabulary_is_located_even_where_the_hash_agrees(
    tmp_path: Path, model: Path
) -> None:
    dataset = split_dataset(tmp_path, model)
    record = dataset.splits["train"].shards[1]
    path = dataset.path / record.name
    content = bytearray(path.read_bytes())
    ids = np.frombuffer(content, "<u2", offset=HEADER_BYTES)
    ids[[77, 500]] = 320  # The vocabulary ends at 319.
    path.write_bytes(content)
    located = f"shard {path}: id 320 of token 77 is outside the vocabulary of 320"
    assert failing_parts(dataset, 1)[0].startswith(f"{located} and its sha256 is")
    write_description(with_hash_of(dataset, 1, content))
    assert failing_parts(open_dataset(dataset.path), 1)[0].startswith(f"{located}, prepare")


def test_all_bad_shards_are_named_at_once(tmp_path: Path, model: Path) -> None:
    dataset = split_dataset(tmp_path, model)
    names = [dataset.splits["train"].shards[n].name for n in (0, 2)]
    for name in names:
        (dataset.path / name).write_bytes(b"")
    found = failing_parts(dataset, 1)[0]
    assert all(f"{name} does not begin with" in found for name in names)


def with_hash_of(dataset: Dataset, shard: int, content: bytes) -> Dataset:
    """Return the dataset with the true hash of a training shard: a maker's fault, not a change."""
    records = list(dataset.splits["train"].shards)
    digest = hashlib.sha256(content).hexdigest()
    records[shard] = dataclasses.replace(records[shard], sha256=digest)
    split = dataclasses.replace(dataset.splits["train"], shards=tuple(records))
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": split})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist, prepare"),
        (lambda path: os.truncate(path, path.stat().st_size - 2), "bytes but by its header"),
        (lambda path: path.write_bytes(b""), "does not begin with"),
    ],
    ids=["missing", "truncated", "emptied"],
)
def test_torn_shard_is_refused_on_opening_and_on_verifying(
    tmp_path: Path, model: Path, damage, message: str
) -> None:
    dataset = split_dataset(tmp_path, model)
    path = dataset.path / dataset.splits["train"].shards[0].name
    damage(path)
    with pytest.raises(ValueError, match=rf"shard {path} .*{message}"):
        dataset.stream("train")
    with pytest.raises(ValueError, match=rf"shard {path} .*{message}"):
        verify_shards(dataset)


def test_shard_cut_short_under_a_running_job_stops_it_with_its_name(
    tmp_path: Path, model: Path
) -> None:
    dataset = split_dataset(tmp_path, model)
    sizes = {"seq_len": 8, "global_batch_size": 64, "microbatch_size": 64, "seed": 0}
    loader = make_loader(dataset.stream("train"), **sizes)
    path = dataset.path / dataset.splits["train"].shards[0].name
    batches = loader.batches(StepRows(0, 0, BatchRamp(64)), 1000, depth=1)
    next(batches)
    os.truncate(path, HEADER_BYTES)
    with pytest.raises(ValueError, match=f"shard {path} was cut short while it was in use"):
        list(batches)


def test_dataset_prepared_again_from_other_text_has_another_fingerprint(
    tmp_path: Path, model: Path
) -> None:
    first = split_dataset(tmp_path, model)
    source = tmp_path / "source.jsonl"
    source.write_bytes(source.read_bytes().replace(b"document 7 ", b"document 9 ", 1))
    config = PrepareConfig(
        input=(str(source),),
        tokenizer=model,
        shard_tokens=1000,
        validation_fraction=0.2,
    )
    second = prepare(config, first.path, workers=1, overwrite=True)
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_fewer_documents_than_ranks_and_windows_than_a_batch_still_give_every_rank_its_rows(
    tmp_path: Path, model: Path, world_size: int
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(json_lines(["one " * 40, "two " * 40])))
    stream = prepared(source, model).stream("train")
    flat = stream.read(0, len(stream)).tolist()
    windows = (len(flat) - 1) // 32
    assert 2 < windows < 8
    seen = {}
    for rank in range(world_size):
        loader = make_loader(
            stream,
            seq_len=32,
            global_batch_size=16,
            microbatch_size=1,
            seed=3,
            rank=rank,
            world_size=world_size,
        )
        assert [int(*loader.mixture.epochs(16 * number)) for number in range(3)] == [
            0,
            16 // windows,
            32 // windows,
        ]
        for t, batch in loader.batches(StepRows(0, 0, BatchRamp(16)), 3):
            for rows in batch:
                tokens, labels = rows.tokens[0].tolist(), rows.labels[0].tolist()
                seen[16 * t + int(rows.samples[0])] = (*tokens, labels[-1])
    # Whatever the number of ranks, each epoch of the endless sequence is every window once.
    expected = {tuple(flat[start : start + 33]) for start in range(0, 32 * windows, 32)}
    assert sorted(seen) == list(range(48))
    for epoch in range(48 // windows):
        assert {seen[epoch * windows + n] for n in range(windows)} == expected


def test_less_text_than_one_sequence_is_refused(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(json_lines(["one", "two"])))
    stream = prepared(source, model).stream("train")
    with pytest.raises(ValueError, match=rf"seq_len 128 needs 129 .* has {len(stream)}, give"):
        make_loader(stream, seq_len=128, global_batch_size=4, microbatch_size=1, seed=0)


def test_shard_changed_between_save_and_resume_is_refused_by_name(launch, corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    job = launch(data__path=copy, faults=[("kill", {"rank": 0, "t": 5})])
    assert -9 in job.wait()
    [shard] = copy.glob("train-*.tokens")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = launch(data__path=copy)
    assert again.wait() == [2, 2], again.output
    assert f"error: shard {shard}" in again.output
    shutil.copytree(corpus, copy, dirs_exist_ok=True)
    assert launch(data__path=copy).wait() == [0, 0]
