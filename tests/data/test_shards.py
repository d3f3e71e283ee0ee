import hashlib
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from data.merging import WriteShard, plan_shards
from data.pieces.plan import Piece
from data.pieces.units import ENCODED, Unit, write_array
from data.shards import ShardHeader, TokenStream, open_shard, token_dtype


def write(folder: Path, documents: list[list[int]], *, vocab_size: int, shard_tokens: int) -> list:
    dtype = token_dtype(vocab_size)
    pieces = folder / "pieces"
    pieces.mkdir()
    units = [Unit(Piece(()), number) for number in range(2)]  # three documents each
    for unit in units:
        rows = documents[3 * unit.number : 3 * unit.number + 3]
        encoded = [(False, len(row), 10 * len(row)) for row in rows]
        write_array(unit.path(pieces, "encoded"), np.array(encoded, ENCODED))
        write_array(unit.path(pieces, "train"), np.array([*chain(*rows)], dtype))
    write_one = WriteShard(folder, dtype, vocab_size, "f" * 64)
    return [write_one(shard) for shard in plan_shards(units, pieces, "train", shard_tokens)]


DOCUMENTS = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 2], [1, 65535, 2], [1, 2]]
FLAT = [1, 5, 6, 2, 1, 7, 2, 1, 8, 9, 10, 2, 1, 65535, 2, 1, 2]


def test_file_holds_a_header_of_1024_bytes_and_raw_little_endian_ids(tmp_path: Path) -> None:
    (record,) = write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=1000)
    content = (tmp_path / "train-00000.tokens").read_bytes()
    assert content[:8] == b"SKIPTOK1"
    assert json.loads(content[8:1024]) == {
        "dtype": "<u2",
        "tokens": 17,
        "documents": 5,
        "text_bytes": 170,
        "vocab_size": 65536,
        "tokenizer_fingerprint": "f" * 64,
    }
    assert content[1024:] == b"".join(token.to_bytes(2, "little") for token in FLAT)
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert [path.name for path in tmp_path.glob("*.*")] == ["train-00000.tokens"]


def test_vocabulary_above_65536_is_stored_in_four_bytes(tmp_path: Path) -> None:
    write(tmp_path, [[1, 65536, 2]], vocab_size=65537, shard_tokens=10)
    header, tokens = open_shard(tmp_path / "train-00000.tokens")
    assert header.dtype == "<u4"
    assert tokens[0:3].tolist() == [1, 65536, 2]


def test_shard_ends_with_the_document_that_fills_it(tmp_path: Path) -> None:
    records = write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=6)
    assert [(r.name, r.tokens, r.documents, r.text_bytes) for r in records] == [
        ("train-00000.tokens", 7, 2, 70),
        ("train-00001.tokens", 8, 2, 80),
        ("train-00002.tokens", 2, 1, 20),
    ]


def test_every_range_of_the_stream_reads_across_shards(tmp_path: Path) -> None:
    records = write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=1)
    stream = TokenStream([open_shard(tmp_path / record.name)[1] for record in records])
    assert len(records) == len(DOCUMENTS)
    assert len(stream) == len(FLAT)
    for start in range(len(FLAT) + 1):
        for count in range(len(FLAT) - start + 1):
            read = stream.read(start, count)
            assert read.dtype == np.int64
            assert read.tolist() == FLAT[start : start + count]


def test_shards_hold_no_file_open(tmp_path: Path) -> None:
    records = write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    stream = TokenStream([open_shard(tmp_path / record.name)[1] for record in records])
    stream.read(0, len(stream))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (16, 2), (18, 0)])
def test_range_outside_the_stream_is_a_value_error(start: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 17\)"):
        TokenStream([np.array(FLAT, dtype=np.uint16)]).read(start, count)


@pytest.mark.parametrize("change", [-1, -20, 3])
def test_shard_of_another_length_names_both_lengths(tmp_path: Path, change: int) -> None:
    write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=1000)
    path = tmp_path / "train-00000.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    expected = rf"train-00000.tokens has {1058 + change} bytes but by its header 1058, prepare"
    with pytest.raises(ValueError, match=expected):
        open_shard(path)


def test_file_that_is_no_shard_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tokens"
    for content in (b"", b"something else", b"SKIPTOK1{}", b"SKIPTOK1" + b"\xff" * 2000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-00000.tokens (does not begin|has a damaged)"):
            open_shard(path)
    with pytest.raises(ValueError, match="does not exist"):
        open_shard(tmp_path / "absent.tokens")


def test_shard_of_another_format_version_is_a_value_error(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=1000)
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(b"SKIPTOK2" + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="does not begin with b'SKIPTOK1', prepare"):
        open_shard(path)


def test_header_is_all_that_open_needs(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS, vocab_size=65536, shard_tokens=1000)
    header, _ = open_shard(tmp_path / "train-00000.tokens")
    assert header == ShardHeader(
        dtype="<u2",
        tokens=17,
        documents=5,
        text_bytes=170,
        vocab_size=65536,
        tokenizer_fingerprint="f" * 64,
    )
