"""Rows and pages of every kind, plain and compressed, are the texts that were written."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import pyarrow
import pytest

import data.sources.html
import data.sources.json_rows
from data.faults import Faults
from data.row_layout import RowLayout
from data.sources.documents import read_documents

TEXTS = [
    "plain",
    'a, "quoted", one',
    "two\nlines\r\n\nmore",
    "\ttabs\t",
    " caf\u00e9 \U0001f389 ",
    "x" * 5000,
    '"',
    "end\n",
]


def zstd_frame(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd_frame,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}


def table(delimiter: str, rows: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([["id", "text"], *rows])
    return text.getvalue().encode()


def kinds(texts: list[str]) -> dict[str, bytes]:
    rows = [{"id": n, "text": text} for n, text in enumerate(texts)]
    numbered = [[str(n), text] for n, text in enumerate(texts)]
    return {
        ".jsonl": "\n".join(map(json.dumps, rows)).encode(),
        ".ndjson": "\n".join(map(json.dumps, rows)).encode(),
        ".json": json.dumps(rows).encode(),
        "-pretty.json": b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode(),
        "-lines.json": "\n".join(map(json.dumps, rows)).encode(),
        "-values.json": "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
        "-object.json": json.dumps({"version": [1], "data": rows}).encode(),
        ".csv": table(",", numbered),
        "-bom.csv": b"\xef\xbb\xbf" + table(",", numbered),
        ".tsv": table("\t", numbered),
    }


def read(*inputs: Path, field: str = "text"):
    faults = Faults()
    return list(read_documents(map(str, inputs), faults, RowLayout(field))), faults


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", kinds([]))
def test_rows_are_the_same_in_every_kind(tmp_path, kind, compression):
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](kinds(TEXTS)[kind]))
    documents, faults = read(path)
    assert [document.text for document in documents] == TEXTS
    assert not faults.counts
    assert [d.text for d in read(tmp_path)[0]] == TEXTS
    number = int(documents[3].origin.removeprefix(f"{path}:"))
    # The first line of the record: a header and three rows, of which one has four lines.
    assert number == {".csv": 8, ".tsv": 8}.get(path.name[path.name.find(".") :][:4], 4)


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_and_pages_are_one_document_in_any_compression(tmp_path, compression):
    content = "caf\u00e9\n\n  two \n"
    path = tmp_path / f"a.md{compression}"
    path.write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + content.encode()))
    page = tmp_path / f"b.html{compression}"
    page.write_bytes(COMPRESS[compression](b"<nav>Menu</nav><h1>Head</h1><p>caf\xc3\xa9"))
    documents, faults = read(path, page)
    assert [document.text for document in documents] == [content, "Head\n\ncaf\u00e9"]
    assert not faults.counts


@pytest.mark.parametrize("compression", list(COMPRESS)[1:])
def test_a_file_may_have_many_frames(tmp_path, compression):
    path, parts = tmp_path / f"a.jsonl{compression}", [TEXTS[:3], TEXTS[3:4], TEXTS[4:]]
    compress = COMPRESS[compression]
    path.write_bytes(
        b"".join(compress(kinds(part)[".jsonl"] + b"\n") for part in parts) + compress(b"")
    )
    documents, faults = read(path)
    assert [document.text for document in documents] == TEXTS
    assert not faults.counts


@pytest.mark.parametrize("damage", ["torn", "followed", "changed"])
@pytest.mark.parametrize("compression", NAMES)
def test_a_damaged_file_ends_at_its_last_whole_line(tmp_path, compression, damage):
    rng = random.Random(0)
    lines = [f"{n} {rng.random()}" for n in range(12000)]
    content = "\n".join(lines).encode() + b"\n"
    compress = COMPRESS[compression] if compression != ".bz2" else lambda x: bz2.compress(x, 1)
    compressed = bytearray(compress(content))
    half = len(compressed) // 2
    if damage == "torn":
        del compressed[half:]
    elif damage == "changed":
        compressed[half : half + 40] = bytes(40)
    else:
        compressed += b"not compressed at all"
    text, rows = (tmp_path / f"{name}{compression}" for name in ("a.txt", "b.csv"))
    for path in (text, rows):
        path.write_bytes(bytes(compressed))
    found, faults = read(rows, field=lines[0])
    reason = f"torn or damaged {NAMES[compression]} file, the rest of it"
    if compression == ".bz2" and damage == "followed":  # which its library leaves out
        assert [document.text for document in found] == lines[1:]
        return
    # A file of Zstandard need not hold a checksum.
    assert faults.counts[reason] == 1 or (compression, damage) == (".zst", "changed")
    if damage == "changed":  # some lines before it may be found out to be wrong later
        assert [document.text for document in found[:2000]] == lines[1:2001]
        return
    count = len(found) + 1
    assert [document.text for document in found] == lines[1:count]
    assert count == 12000 if damage == "followed" else 2000 < count < 11500
    documents, faults = read(text)
    assert documents[0].text == "\n".join(lines[:count]) + "\n"
    assert faults.examples == {reason: [f"{text}:{count + 1}"]}
    if compression == ".zst":
        assert count == slow_zstd(bytes(compressed)).count(b"\n")


def slow_zstd(compressed):
    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(compressed), "zstd")
    found = bytearray()
    try:
        while byte := stream.read(1):
            found += byte
    except OSError:
        pass
    return found


def test_faults_of_tables_cost_their_row_and_no_other(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"text,id\ngood 1,1\nshort\n\nlong,2,3\nbad \xff,4\n,5\n"
        b'"two\nlines",6\n"a" b,7\nnul \0,8\ngood 2,9\n"open,10\nlost,11\n'
    )
    documents, faults = read(path)
    assert [document.text for document in documents] == ["good 1", "two\nlines", "good 2"]
    assert faults.examples == {
        "row with more or fewer fields than the header": [f"{path}:3", f"{path}:5"],
        "invalid UTF-8": [f"{path}:6"],
        "empty document": [f"{path}:7"],
        "malformed row": [f"{path}:10"],
        "NUL character": [f"{path}:11"],
        "malformed row, the rest of it": [f"{path}:13"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,body\n1,x\n", "text_field text is no column of .*, give one of: id, body"),
        (b"text,text\n1,x\n", "text_field text is twice in the header of "),
        (b"id;text\n1;x\n", "give one of: id;text"),
    ],
)
def test_a_header_without_the_column_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("content", "texts", "faults"),
    [
        (b'[{"text": "a"}, {"id": 1}, 3, {"text": "b\\u0000"}, {"text": "c"}]', "ac", 3),
        (b'[{"text": "a"}, {"text": "b \xff"}, {"text": "c"}]', "ac", 1),
        (b'[{"text": "a"}, {"text": "b"', "a", 1),
        (b'[{"text": "a"} {"text": "b"}]', "a", 1),
        (b'[{"text": "a"}, {"text": "b"}] x', "ab", 1),
        (b'{"text": "a", "list": [{"text": "b"}]}', "a", 0),
        (b'{\n "list": [{"text": "b"}],\n "text": "a"}', "a", 0),
        (b'{\n "name": "package", "list": [1]}', "", 1),
        (b'{"text": "a"}\n{"text": \n{"text": "c"}\n', "ac", 1),
        (b"", "", 0),
        (b"[]", "", 0),
        (b"[1", "", 2),
        (b"[" * 100_000, "", 1),
        (b'{"a":' * 100_000, "", 1),
    ],
)
def test_shapes_and_faults_of_json(tmp_path, content, texts, faults):
    (tmp_path / "a.json").write_bytes(content)
    documents, found = read(tmp_path / "a.json")
    assert [document.text for document in documents] == [*texts]
    assert found.counts.total() == faults


def test_an_array_larger_than_a_block_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources.json_rows, "_BLOCK_BYTES", 16)
    rows = [{"text": f"{n}" * (n % 50 + 1), "more": [n, {"x": [1.5]}]} for n in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [d.text for d in read(tmp_path / "a.json")[0]] == [row["text"] for row in rows]
    (tmp_path / "b.json").write_text("[" + "1234567, " * 20 + '{"text": "a"}]')
    documents, faults = read(tmp_path / "b.json")  # a number may be cut by a block
    assert ([document.text for document in documents], faults.counts.total()) == (["a"], 20)
    monkeypatch.setattr(data.sources.json_rows, "MAX_DOCUMENT_BYTES", 300)
    (tmp_path / "a.json").write_text(json.dumps([*rows[:40], {"text": "x" * 700}, *rows[:9]]))
    documents, faults = read(tmp_path / "a.json")
    assert [document.text for document in documents] == [row["text"] for row in rows[:40]]
    assert [*faults.examples.values()] == [[f"{tmp_path}/a.json:41"]]


PAGE = """<html><head><title>T</title><style>p {}</style></head><body>
<header>Site</header><nav><a href="/">Home</a></nav><aside>Ad</aside>
<article><header><h1>Head &amp; tail</h1></header><p>First <b>one</b>.</p><script>x = 1</script>
<pre>def f():
    return 1</pre><ul><li>one<li>two</ul></article><footer>Copyright</footer></body></html>"""


def test_the_text_of_a_page_has_no_menus_and_keeps_lists_and_code(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.htm").write_bytes(b"<meta charset=iso-8859-1><p>caf\xe9")
    (tmp_path / "c.html").write_text("<html><nav>Home</nav><script>1</script></html>")
    documents, faults = read(tmp_path)
    text = documents[0].text
    for part in ("Head & tail\n", "First one.\n", "def f():\n    return 1\n", "one\n", "two"):
        assert part in text
    for part in ("Site", "Home", "Ad", "x = 1", "Copyright", "T\n", "{}"):
        assert part not in text
    assert documents[1].text == "caf\u00e9"
    assert faults.examples == {"empty document": [str(tmp_path / "c.html")]}
    (tmp_path / "a.html").write_text("<ul><li>x" * 101)
    assert "lists nested deeper" in read(tmp_path / "a.html")[1].lines()[0]
    monkeypatch.setattr(data.sources.html, "_MAX_TAGS", 3)
    (tmp_path / "a.html").write_text("<p>x" * 4)
    assert "HTML of more than 3 tags" in read(tmp_path / "a.html")[1].lines()[0]


def test_a_small_xz_file_may_not_ask_for_gigabytes(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**29}]
    # The size of its dictionary is in its header alone.
    content = lzma.compress(b'{"text": "a"}\n', filters=filters)
    (tmp_path / "a.jsonl.xz").write_bytes(content)
    documents, faults = read(tmp_path / "a.jsonl.xz")
    assert documents == []
    assert faults.counts == {"torn or damaged xz file, the rest of it": 1}
