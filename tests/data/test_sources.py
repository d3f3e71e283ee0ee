import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import data.sources.lines
import data.sources.parquet
import data.sources.text
from data.faults import Faults
from data.row_layout import Document, RowLayout
from data.sources.documents import read_documents, read_sources
from data.sources.source import Source


def read(*inputs: str | Path, text_field: str = "text") -> tuple[list[Document], Faults]:
    faults = Faults()
    return list(read_documents(map(str, inputs), faults, RowLayout(text_field))), faults


def texts(*inputs: str | Path, text_field: str = "text") -> list[str]:
    documents, faults = read(*inputs, text_field=text_field)
    assert not faults.counts
    return [document.text for document in documents]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_text_file_is_one_document_as_it_stands(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"one\r\n\ttwo\n\n caf\xc3\xa9 ")
    assert read(path)[0] == [Document(str(path), "one\r\n\ttwo\n\n caf\u00e9 ")]


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path / "a.txt") == ["one"]


def test_json_lines_are_one_document_each_plain_or_gzipped(tmp_path: Path) -> None:
    content = '{"text": "one\\ntwo"}\n\n{"id": 3, "text": "caf\u00e9"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        documents, faults = read(tmp_path / name)
        assert [d.text for d in documents] == ["one\ntwo", "caf\u00e9"]
        assert [d.origin for d in documents] == [f"{tmp_path / name}:{n}" for n in (1, 3)]
        assert not faults.counts


def test_parts_of_json_lines_hold_each_line_once_wherever_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = '\ufeff{"text": "one"}\n\n{"text": "caf\u00e9"}\r\n{\n{"text": "four"}'.encode()
    path.write_bytes(content)
    for cut in range(1, len(content)):
        parts = [Source(path, "a.jsonl", part) for part in ((0, cut), (cut, None))]
        faults = [Faults(), Faults()]
        found = [
            document.text
            for part, fault in zip(parts, faults, strict=True)
            for document in read_sources([part], fault, RowLayout())
        ]
        assert found == ["one", "caf\u00e9", "four"], cut
        assert sum(fault.lines_read for fault in faults) == 5
        assert sum(fault.counts["malformed JSON"] for fault in faults) == 1


def test_text_field_names_the_json_field_and_the_parquet_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": 3}\n')
    table = pyarrow.table({"text": [3, 4], "body": ["two", "three"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert texts(tmp_path, text_field="body") == ["one", "two", "three"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert read(tmp_path / "a.jsonl", text_field="body")[1].counts == {"no field 'body'": 1}


def test_parquet_rows_are_read_over_many_batches(tmp_path: Path) -> None:
    rows = [f"row {n}" for n in range(5000)]
    table = pyarrow.table({"text": pyarrow.array(rows).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert texts(tmp_path / "a.parquet") == rows


def test_folder_is_read_in_sorted_order_without_hidden_entries(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".git/d.txt", "a/.e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts(tmp_path) == ["a/b/c.txt", "a/z.txt", "b.txt"]


def test_glob_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]


def test_unknown_files_in_a_folder_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    documents, faults = read(tmp_path)
    assert [d.text for d in documents] == ["one"]
    assert faults.examples == {"unknown file kind": [str(tmp_path / "b.png")]}


def test_text_faults_are_reported_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (tmp_path / "b.txt").write_bytes(b" \n\t")
    (tmp_path / "c.txt").write_bytes(b"x\0y")
    (tmp_path / "d.txt").write_bytes(b"good")
    documents, faults = read(tmp_path)
    assert [d.text for d in documents] == ["good"]
    assert faults.examples == {
        "invalid UTF-8": [f"{tmp_path}/a.txt:3"],
        "empty document": [f"{tmp_path}/b.txt"],
        "NUL character": [f"{tmp_path}/c.txt"],
    }


def test_json_faults_cost_their_line_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good 1"}',
        b'{"text": "bad \xff"}',
        b'{"text": "torn',
        b'{"body": "other"}',
        b'{"text": null}',
        b'["text"]',
        b'{"text": ""}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "half \\ud800"}',
        b"[" * 100_000,
        b'{"text": "good 2"}',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, faults = read(path)
    assert [d.text for d in documents] == ["good 1", "good 2"]
    assert faults.examples == {
        "invalid UTF-8": [f"{path}:2", f"{path}:9"],
        "malformed JSON": [f"{path}:3", f"{path}:10"],
        "no field 'text'": [f"{path}:4", f"{path}:6"],
        "field 'text' is not a string": [f"{path}:5"],
        "empty document": [f"{path}:7"],
        "NUL character": [f"{path}:8"],
    }


def test_parquet_faults_cost_their_row_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"good 1", None, b"bad \xff", b"", b"good 2"], pyarrow.binary())
    table = pyarrow.table({"text": raw.view(pyarrow.string())})
    pyarrow.parquet.write_table(table, path)
    documents, faults = read(path)
    assert [d.text for d in documents] == ["good 1", "good 2"]
    assert faults.examples == {
        "no field 'text'": [f"{path}:2"],
        "invalid UTF-8": [f"{path}:3"],
        "empty document": [f"{path}:4"],
    }


def test_torn_gzip_gives_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    rng = random.Random(0)
    lines = [json.dumps({"text": f"{n} {rng.random()}"}) for n in range(5000)]
    content = gzip.compress("\n".join(lines).encode())
    path.write_bytes(content[: len(content) // 2])
    documents, faults = read(path)
    assert 1000 < len(documents) < 4000
    assert [d.text for d in documents] == [json.loads(li)["text"] for li in lines[: len(documents)]]
    assert faults.counts == {"torn or damaged gzip file, the rest of it": 1}
    assert faults.lines()[0].endswith(f"({path}:{len(documents) + 1})")


def test_very_long_text_file_is_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.sources.lines, "MAX_DOCUMENT_BYTES", 200)
    monkeypatch.setattr(data.sources.text, "MAX_DOCUMENT_BYTES", 200)
    monkeypatch.setattr(data.sources.text, "_PART_BYTES", 50)
    path = tmp_path / "a.txt"
    lines = [f"line {n} caf\u00e9 {'x' * (n % 7)}\n" for n in range(1, 60)]
    path.write_text("\ufeff" + "".join(lines), encoding="utf-8")
    documents, faults = read(path)
    assert not faults.counts
    assert "".join(document.text for document in documents) == "".join(lines)
    assert {50 <= len(document.text.encode()) < 80 for document in documents[:-1]} == {True}
    assert documents[0].origin == str(path)
    for document in documents[1:]:
        line = int(document.origin.removeprefix(f"{path}:"))
        assert document.text.startswith(lines[line - 1])
    path.write_bytes(b"good\n" * 20 + b"bad \xff\n" + b"x" * 450 + b"\n" + b"good\n" * 20)
    documents, faults = read(path)
    assert "".join(document.text for document in documents).count("good\n") > 20
    assert faults.examples == {
        "invalid UTF-8": [f"{path}:21"],
        "longer than 268 MB": [f"{path}:22"],
    }


def test_very_long_parquet_row_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.sources.parquet, "MAX_DOCUMENT_BYTES", 200)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "x" * 201, "x" * 200]}), path)
    documents, faults = read(path)
    assert [len(document.text) for document in documents] == [3, 200]
    assert faults.examples == {"longer than 268 MB": [f"{path}:2"]}


def test_only_the_first_examples_of_a_fault_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 10)
    _, faults = read(path)
    assert faults.lines() == [f"skipped 10: malformed JSON ({path}:1, {path}:2, {path}:3, ...)"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.txt", "does not exist, give"),
        ("absent/*.txt", "does not exist, give"),
        ("a.png", "is of an unknown kind, give"),
        ("a.parquet", "is not a Parquet file"),
        ("b.parquet", r"text_field text is no column of .*, give one of: body"),
        ("c.parquet", r"text_field text of .* holds int64, give a column of text"),
    ],
)
def test_unusable_input_is_a_value_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_embedded_is_the_standard_library_and_torch_without_tests() -> None:
    documents, faults = read("embedded")
    origins = [document.origin for document in documents]
    assert {"python/argparse.py", "python/json/decoder.py", "torch/nn/functional.py"} <= {*origins}
    assert origins == sorted(origins)
    folders = {folder for origin in origins for folder in origin.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert set(faults.counts) <= {"empty document", "invalid UTF-8"}
    # Measured 58.5 MB with Python 3.11 and torch 2.13; versions differ, but not by tens.
    assert 30e6 < sum(len(document.text) for document in documents) < 150e6


def test_reading_sources_does_not_import_torch() -> None:
    code = "import sys, data.prepare, data.sources.listing as s; s._list_embedded(); "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
