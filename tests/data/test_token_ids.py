"""Token ids of other programs: every layout gives the ids it holds, or one line."""

import json
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from data.boundaries import Boundaries
from data.dataset import TRAIN, VALIDATION, open_dataset, verify_shards
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.token_ids.piece_lengths import piece_lengths
from data.token_ids.splitting import TokenOptions, list_token_files
from data.tokenizer import Tokenizer
from data.windows import find_documents

EOS = 2


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [
        f"text {i} of caf\u00e9 {rng.integers(10**6)}\n" * rng.integers(1, 5) for i in range(80)
    ]


@pytest.fixture(scope="module")
def ids(texts, tokenizer_path) -> list[list[int]]:
    tokenizer = Tokenizer(tokenizer_path)
    return [[*tokenizer.encode(text), EOS] for text in texts]


def config(path, tokenizer, **settings) -> PrepareConfig:
    options = {name: settings.pop(name) for name in [*settings] if name in OPTIONS}
    return PrepareConfig(
        input=(str(path),), tokenizer=tokenizer, tokens=TokenOptions(**options), **settings
    )


OPTIONS = ("tokens_field", "token_dtype", "validation_input")


def prepared(path, tokenizer, **settings):
    output = path.parent / "dataset"
    dataset = prepare(config(path, tokenizer, **settings), output)
    assert open_dataset(output) == dataset
    verify_shards(dataset)
    return dataset


def tokens_of(dataset, split=None) -> list[int]:
    names = [split] if split else [TRAIN, VALIDATION]
    streams = [dataset.stream(name) for name in names]
    return [token for stream in streams for token in stream.read(0, len(stream)).tolist()]


def write_megatron(path: Path, documents: list[list[int]], code: int, dtype: str) -> None:
    np.concatenate(documents).astype(dtype).tofile(path)
    lengths = np.array([*map(len, documents)], "<i4")
    starts = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    count = len(documents)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, count + 1)
    numbers = np.arange(count + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + starts.tobytes() + numbers)


def write(folder: Path, kind: str, documents: list[list[int]]) -> Path:
    flat = np.concatenate(documents)
    path = folder / ("a.npy" if "npy" in kind else "a.bin")
    if kind in ("nanogpt .bin", "olmo .npy"):
        flat.astype("<u2").tofile(path)
    elif kind == "uint32 .bin":
        flat.astype("<u4").tofile(path)
    elif kind.startswith("llm.c"):
        magic, dtype = ((20240801, 7), "<u4") if "llama" in kind else ((20240520, 1), "<u2")
        header = np.zeros(256, "<i4")
        header[:3] = *magic, len(flat)
        path.write_bytes(header.tobytes() + flat.astype(dtype).tobytes())
    elif kind == "numpy .npy":
        np.save(path, flat.astype("<i4"))
    else:
        code, dtype = (8, "<u2") if kind == "megatron uint16" else (4, "<i4")
        write_megatron(path, documents, code, dtype)
    return path


@pytest.mark.parametrize(
    "kind",
    ["nanogpt .bin", "uint32 .bin", "llm.c .bin", "llm.c llama .bin", "olmo .npy", "numpy .npy"]
    + ["megatron uint16", "megatron int32"],
)
def test_files_are_read_where_they_are(tmp_path, tokenizer_path, texts, ids, kind) -> None:
    path = write(tmp_path, kind, ids)
    dtype = "uint32" if kind.startswith("uint32") else "auto"
    dataset = prepared(path, tokenizer_path, token_dtype=dtype, validation_fraction=0.1)
    assert tokens_of(dataset) == [token for document in ids for token in document]
    assert {file.name for file in dataset.path.iterdir()} == {"dataset.json", "tokenizer.model"}
    assert dataset.marks == "last"
    starts = find_documents(dataset.stream(VALIDATION), Boundaries(1, EOS, dataset.marks))
    held_out = len(starts)
    assert tokens_of(dataset, TRAIN)[-1] == EOS, "cut at the end of a document"
    assert [dataset.splits[name].documents for name in (TRAIN, VALIDATION)] == [
        len(texts) - held_out, held_out,
    ]  # fmt: skip
    size = sum(split.text_bytes for split in dataset.splits.values())
    assert size == len("".join(texts).encode())
    assert 0 < len(dataset.stream(VALIDATION)) <= 0.1 * len(tokens_of(dataset))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"token file .* does not exist, put it back or prepare"):
        open_dataset(dataset.path).stream(TRAIN)
    path.write_bytes((tmp_path / "elsewhere").read_bytes() + b"ab")
    with pytest.raises(ValueError, match=r"has \d+ bytes, not \d+, put it back or prepare"):
        open_dataset(dataset.path).stream(TRAIN)


def test_damage_within_a_file_is_found_before_training(tmp_path, tokenizer_path, ids) -> None:
    path = write(tmp_path, "nanogpt .bin", ids)
    dataset = prepared(path, tokenizer_path)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its sha256 is"):
        verify_shards(dataset)


@pytest.mark.parametrize("marks", ["both", "first", "last"])
@pytest.mark.parametrize("one_token", [False, True])
def test_what_marks_documents_is_found(tmp_path, tokenizer_path, ids, marks, one_token) -> None:
    if one_token:  # As GPT-2, whose <|endoftext|> is both.
        content = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel(
            {f"w{i}": i for i in range(320)}, unk_token="w0")).to_str())  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w2"}')
        tokenizer_path = tmp_path / "tokenizer.json"
    bos = EOS if one_token else 1
    first, last = [bos] * (marks != "last"), slice(None, None if marks != "first" else -1)
    documents = [[*first, *document[last]] for document in ids]
    path = write(tmp_path, "nanogpt .bin", documents)
    dataset = prepared(path, tokenizer_path, validation_fraction=0.3)
    assert dataset.marks == marks
    found = [token for document in documents for token in document]
    assert tokens_of(dataset) == found
    assert sum(split.documents for split in dataset.splits.values()) == len(ids)


def test_one_long_document_is_cut_where_the_share_ends(tmp_path, tokenizer_path) -> None:
    path = tmp_path / "train.bin"
    np.arange(1000, dtype="<u2").astype("<u2").clip(3, 300).tofile(path)
    dataset = prepared(path, tokenizer_path, validation_fraction=0.1)
    assert len(dataset.stream(VALIDATION)) == 100


def test_files_to_hold_out_are_named(tmp_path, tokenizer_path, ids) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        write(folder, "nanogpt .bin", ids[i::3]).rename(folder / f"train_{i}.bin")
    write(folder, "nanogpt .bin", ids[:4]).rename(tmp_path / "val.bin")
    given = config(folder, tokenizer_path, validation_input=(str(tmp_path / "val.bin"),))
    dataset = prepare(given, tmp_path / "dataset")
    assert tokens_of(dataset, VALIDATION) == [token for each in ids[:4] for token in each]
    train = [token for i in range(3) for each in ids[i::3] for token in each]
    assert tokens_of(dataset, TRAIN) == train


def test_our_own_shards_keep_their_split(tmp_path, corpus) -> None:
    own = open_dataset(corpus)
    dataset = prepare(config(corpus, own.tokenizer_path), tmp_path / "dataset")
    for name, split in own.splits.items():
        found = dataset.splits[name]
        assert tokens_of(dataset, name) == tokens_of(own, name)
        assert (found.documents, found.text_bytes) == (split.documents, split.text_bytes)
    assert dataset.marks == "both"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved", "megatron without EOS"])
@pytest.mark.parametrize("ends", ["none", "both"])
def test_rows_are_copied_between_one_bos_and_one_eos(tmp_path, tokenizer_path, ids, kind, ends):
    rows = [[1, *row] if ends == "both" else row[:-1] for row in ids]
    field = {"tokens_field": "input_ids"}
    path = tmp_path / "rows.parquet"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), path, row_group_size=7)
    elif kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        bad = [{"input_ids": [1.5]}, {"input_ids": []}, {}, {"input_ids": [2**70]}]
        path.write_text(
            "\n".join(json.dumps(row) for row in [{"input_ids": r} for r in rows] + bad)
        )
    elif kind == "saved":
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    else:
        field, path = {}, tmp_path / "a.bin"
        write_megatron(path, [row[:-1] for row in rows] if ends == "both" else rows, 4, "<i4")
    given = PrepareConfig(
        input=(f"hf:{path}" if kind == "saved" and ends == "both" else str(path),),
        tokenizer=tokenizer_path,
        tokens=TokenOptions(**field),
        validation_fraction=0.1,
    )
    dataset = prepare(given, tmp_path / "dataset")
    verify_shards(dataset)
    boundaries = Boundaries(1, EOS, dataset.marks)
    found = []
    for name in (TRAIN, VALIDATION):
        stream = dataset.stream(name)
        starts = find_documents(stream, boundaries)
        found += [
            tuple(stream.read(a, b - a).tolist())
            for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)
        ]
    assert sorted(found) == sorted((1, *row) for row in ids)
    assert sum(dataset.skipped.values()) == (4 if kind == "jsonl" else 0)


def _without(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("kind", "harm", "reason"),
    [
        ("nanogpt .bin", lambda path: _without(path, 1), "no multiple of 2, give its --token_dtyp"),
        ("llm.c .bin", lambda path: _without(path, 2), "bytes but by its header"),
        ("numpy .npy", lambda path: _without(path, 4), "bytes but by its header"),
        ("numpy .npy", lambda path: np.save(path, np.ones((2, 3))), "save one row of integers"),
        ("numpy .npy", lambda path: path.write_bytes(b"\x93NUMPY\1\0\xff\0{"), "damaged header"),
        ("megatron int32", lambda path: _without(path, 4), "bytes but by its header"),
        ("megatron int32", lambda path: _without(path.with_suffix(".idx"), 900), "cut short"),
        (
            "megatron int32",
            lambda path: path.with_suffix(".idx").write_bytes(b"x" * 40),
            "no index of Megatron",
        ),
        (
            "ids beyond .bin",
            lambda path: None,
            "is 900, outside of the tokenizer's 320 ids",
        ),
        ("nanogpt .bin", lambda path: path.write_bytes(b""), "holds no token files with ids"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, tokenizer_path, ids, kind, harm, reason) -> None:
    if kind == "ids beyond .bin":
        kind, ids = "nanogpt .bin", [[900, EOS]]
    path = write(tmp_path, kind, ids)
    harm(path)
    with pytest.raises(ValueError, match=reason) as caught:
        prepared(path, tokenizer_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dataset").exists()


def test_a_folder_of_text_stays_text_beside_a_token_file(tmp_path, tokenizer_path, ids) -> None:
    write(tmp_path, "nanogpt .bin", ids)
    (tmp_path / "b.txt").write_text("a text")
    assert list_token_files([str(tmp_path)]) is None
    (tmp_path / "b.txt").unlink()
    assert list_token_files([str(tmp_path)]) == [tmp_path / "a.bin"]


def test_text_and_ids_are_not_mixed(tmp_path, tokenizer_path, ids) -> None:
    path = write(tmp_path, "nanogpt .bin", ids)
    (tmp_path / "b.txt").write_text("text")
    given = PrepareConfig(input=(str(path), str(tmp_path / "b.txt")), tokenizer=tokenizer_path)
    with pytest.raises(ValueError, match=r"b\.txt holds no token files, prepare it by itself"):
        prepare(given, tmp_path / "dataset")
    given = PrepareConfig(input=(str(path),), vocab_size=400)
    with pytest.raises(ValueError, match="vocab_size trains a tokenizer on text"):
        prepare(given, tmp_path / "dataset")
    given = config(tmp_path / "b.txt", tokenizer_path, validation_input=("val.bin",))
    with pytest.raises(ValueError, match="validation_input: for token files alone, but the input"):
        prepare(given, tmp_path / "dataset")
    given = config(tmp_path / "c.bin", tokenizer_path, validation_input=("val.bin",))
    with pytest.raises(ValueError, match="validation_input: .* the input is missing"):
        prepare(given, tmp_path / "dataset")
    for option in ({"token_dtype": "uint32"}, {"validation_input": ("val.bin",)}):
        given = config(tmp_path / "b.jsonl", tokenizer_path, tokens_field="input_ids", **option)
        with pytest.raises(ValueError, match=f"{[*option][0]}: for token files alone, but tokens"):
            prepare(given, tmp_path / "dataset")
    hidden = tmp_path / "folder" / ".checkpoints"
    hidden.mkdir(parents=True)
    write(hidden, "nanogpt .bin", ids)
    assert list_token_files([str(tmp_path / "folder")]) is None


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_ids_that_are_wider_than_assumed_are_refused(tmp_path, tokenizer_path, ids, dtype) -> None:
    path = tmp_path / "a.bin"
    np.concatenate(ids).astype(dtype).tofile(path)
    with pytest.raises(ValueError, match="every second id is 0 as <u2, give the --token_dtype"):
        prepared(path, tokenizer_path)
    dataset = prepared(path, tokenizer_path, token_dtype=np.dtype(dtype).name)
    assert tokens_of(dataset) == np.concatenate(ids).tolist()


def test_a_document_that_two_files_share_is_counted_once(tmp_path, tokenizer_path, ids) -> None:
    flat = np.concatenate(ids).astype("<u2")
    for i, part in enumerate(np.split(flat, [len(ids[0]) + 2])):
        part.tofile(tmp_path / f"{i}.bin")
    dataset = prepare(config(tmp_path / "*.bin", tokenizer_path), tmp_path / "dataset")
    assert sum(split.documents for split in dataset.splits.values()) == len(ids)


def test_lengths_of_byte_level_pieces_are_bytes(tmp_path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    text = "caf\u00e9 \U0001f600 and \u65e5\u672c more of it\n" * 3
    model.train_from_iterator([text], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    lengths = piece_lengths(tokenizer)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.eos_id] == 0
