"""What is wrong with a corpus: counted and located, or refused with the reason.

Most faults here are put into the middle of a good corpus. The expected end state is then exact:
the dataset of the good documents alone, to the byte, and one line named.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import data.sources.lines
from data.dataset import Dataset, open_dataset
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.tokenizer import Tokenizer
from tests.documents import make_documents

REPOSITORY = Path(__file__).parents[2]

# Prints the peak memory in MB, of the command and of its workers; a fork of pytest itself would
# begin with what pytest holds.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(status)
"""


def json_lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() + b"\n" for text in texts]


def command(source: Path, output: Path, tokenizer: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "data.prepare", "--input", str(source), "--output", str(output)]
    return [*run, "--tokenizer", str(tokenizer), *more]


def prepared(source: Path, tokenizer: Path, **changes: float) -> Dataset:
    """Prepare beside the source, in this process."""
    config = PrepareConfig(input=(str(source),), tokenizer=tokenizer, **changes)
    return prepare(config, source.parent / f"{source.name}-dataset", workers=1)


def shards(dataset: Dataset) -> dict[str, list[str]]:
    return {name: [s.sha256 for s in split.shards] for name, split in dataset.splits.items()}


@pytest.fixture(scope="module")
def model(tokenizer_path: Path) -> Path:
    """Return a tokenizer of 320 tokens."""
    return tokenizer_path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Dataset:
    """Return the dataset of 40 good documents."""
    source = tmp_path_factory.mktemp("good") / "good.jsonl"
    source.write_bytes(b"".join(json_lines(make_documents(40))))
    return prepared(source, model, validation_fraction=0.2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (b'{"text": "torn', "malformed JSON"),
        (b'{"text": "torn {"text": "written over"}', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        (b'{"text": "half \\udc00"}', "invalid UTF-8"),
        (b'{"text": "a\\u0000b"}', "NUL character"),
        (b"\0" * 4096, "malformed JSON"),
        (b'{"text": " \\n"}', "empty document"),
        (b'{"body": "other"}', "no field 'text'"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": ["a"]}', "field 'text' is not a string"),
        (b'{"text": null}', "field 'text' is not a string"),
        (b'{"text": "' + b"long" * 30_000 + b'"}', "longer than 268 MB"),
    ],
)
def test_bad_line_costs_itself_alone_and_is_located(
    tmp_path: Path,
    good: Dataset,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: bytes,
    reason: str,
) -> None:
    monkeypatch.setattr(
        data.sources.lines, "MAX_DOCUMENT_BYTES", 110_000
    )  # To test without 268 MB.
    lines = json_lines(make_documents(40))
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join([*lines[:20], fault + b"\n", *lines[20:]]))
    dataset = prepared(source, model, validation_fraction=0.2)
    assert shards(dataset) == shards(good)
    assert dataset.skipped == {reason: 1}
    assert dataset.skipped_at == {reason: [f"{source}:21"]}
    assert open_dataset(dataset.path) == dataset


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.replace(b"\n", b"\n\n"),
        lambda content: content.removesuffix(b"\n"),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last newline"],
)
def test_harmless_oddities_change_nothing(
    tmp_path: Path, good: Dataset, model: Path, change
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(change(b"".join(json_lines(make_documents(40)))))
    dataset = prepared(source, model, validation_fraction=0.2)
    assert shards(dataset) == shards(good)
    assert dataset.skipped == {}


def write_folder_with_faults(folder: Path) -> dict[str, list[str]]:
    """Write 40 good documents, and bad files around them; return the expected lines."""
    folder.mkdir()
    content = b"".join(json_lines(make_documents(40)))
    # Stored, not compressed: each byte of the file is a byte of the text.
    torn = gzip.compress(content, compresslevel=0)[:3000]
    whole_lines = torn.count(b"\n")
    assert 2 < whole_lines < 40
    (folder / "a.jsonl.gz").write_bytes(torn)
    (folder / "b.jsonl").write_bytes(content)
    (folder / "c.jsonl.gz").write_bytes(b"not gzip at all")
    (folder / "d.txt").write_bytes(b"one\ntwo\nthree \xff\xfe\n")
    (folder / "e.txt").write_bytes(b"")
    (folder / "f.png").write_bytes(b"\x89PNG")
    (folder / "g.txt").symlink_to("nowhere")
    os.mkfifo(folder / "h.jsonl")
    return {
        "torn or damaged gzip file, the rest of it": [
            f"{folder}/a.jsonl.gz:{whole_lines + 1}",
            f"{folder}/c.jsonl.gz:1",
        ],
        "invalid UTF-8": [f"{folder}/d.txt:3"],
        "empty document": [f"{folder}/e.txt"],
        "unknown file kind": [f"{folder}/f.png"],
        "neither a file nor a folder, or a link to a folder": [
            f"{folder}/g.txt",
            f"{folder}/h.jsonl",
        ],
    }


def test_command_reports_every_bad_file_and_keeps_the_rest(tmp_path: Path, model: Path) -> None:
    expected = write_folder_with_faults(tmp_path / "in")
    summary = tmp_path / "summary.json"
    options = ("--json", str(summary), "--max_skipped_fraction", "0.2")
    arguments = command(tmp_path / "in", tmp_path / "out", model, *options)
    done = subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(summary.read_text())["skipped_at"] == expected
    for reason, lines in expected.items():
        assert f"skipped {len(lines)}: {reason} ({', '.join(lines)})" in done.stderr
        assert f"skipped {len(lines)}: {reason} (first: {', '.join(lines)})" in done.stdout
    dataset = open_dataset(tmp_path / "out")
    kept = sum(split.documents for split in dataset.splits.values())
    torn_at = int(expected["torn or damaged gzip file, the rest of it"][0].rpartition(":")[2])
    assert kept == 40 + torn_at - 1
    assert dataset.duplicates == torn_at - 1


def test_damaged_parquet_is_refused_with_the_row(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": make_documents(300)})
    pyarrow.parquet.write_table(
        table, path, row_group_size=100, compression="none", use_dictionary=False
    )
    whole = path.read_bytes()
    second = whole.index(b"document 100")
    path.write_bytes(whole[: second - 60] + bytes(60) + whole[second:])
    # Of the second row group; rows are fetched 64 at a time.
    with pytest.raises(ValueError, match=rf"input {path} cannot be read after row 64, remove"):
        prepared(path, model)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"input {path} is not a Parquet file, remove"):
        prepared(path, model)


def test_mostly_damaged_input_is_refused_with_counts_and_lines(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = json_lines(make_documents(36)) + [b'{"text": 1}\n', b"{\n", b"{\n", b"{\n"]
    source.write_bytes(b"".join(lines))
    assert prepared(source, model, max_skipped_fraction=0.1).skipped == {
        "malformed JSON": 3,
        "field 'text' is not a string": 1,
    }
    source = tmp_path / "b.jsonl"
    source.write_bytes(b"".join(lines[1:]))
    expected = (
        "4 of 39 documents cannot be used, skipped 1: field 'text' is not a string "
        f"({source}:36); skipped 3: malformed JSON ({source}:37, {source}:38, {source}:39): mend"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        prepared(source, model)
    assert not list(tmp_path.glob("*b.jsonl-dataset*"))
    assert prepared(source, model, max_skipped_fraction=0.11).skipped_at


def test_empty_documents_are_no_damage(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(json_lines(make_documents(4) + [""] * 100)))
    dataset = prepared(source, model, max_skipped_fraction=0)
    assert dataset.skipped == {"empty document": 100}


def test_line_of_50_megabytes_is_prepared_in_bounded_memory(tmp_path: Path, model: Path) -> None:
    long = "self return " * 2_000_000 + "x" * 26_000_000
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(json_lines([*make_documents(20), long])))
    arguments = command(source, tmp_path / "out", model, "--workers", "2")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Ten times the text, for the interpreter, its copies and 2 bytes for each of 30 million ids.
    # In one piece SentencePiece alone took 2800 MB.
    assert int(done.stdout.split()[-1]) < 600
    dataset = open_dataset(tmp_path / "out")
    assert sum(split.text_bytes for split in dataset.splits.values()) > len(long)


@pytest.mark.parametrize("unit", ["self", "self ", "self\n", " ", "\n", "\u65e5"])
def test_token_repeated_a_million_times_comes_back_as_it_was(model: Path, unit: str) -> None:
    tokenizer = Tokenizer(model)
    begin = time.process_time()
    pieces = list(tokenizer.encode_pieces(unit * 1_000_000))
    assert time.process_time() - begin < 10
    assert max(map(len, pieces)) <= 3 * 65536  # At most the three bytes of each character.
    assert tokenizer.decode([i for piece in pieces for i in piece]) == unit * 1_000_000


def test_single_text_file_is_split_at_a_line_end(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "book.txt"
    text = "".join(f"line {n} of the book\n" for n in range(10_000))
    source.write_text(text)
    dataset = prepared(source, model, validation_fraction=0.1)
    tokenizer = Tokenizer(dataset.tokenizer_path)
    parts = []
    for name in ("train", "validation"):
        stream = dataset.stream(name)
        parts.append(tokenizer.decode(stream.read(0, len(stream)).tolist()))
    assert "".join(parts) == text
    assert parts[1].startswith("line ")
    assert len(text) / 10 <= len(parts[1]) < len(text) / 10 + 24
    again = PrepareConfig(input=(str(source),), tokenizer=model, validation_fraction=0.1)
    assert prepare(again, tmp_path / "again", workers=2).fingerprint == dataset.fingerprint


def test_killed_worker_ends_the_command_with_its_reason(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "a.jsonl"
    text = "self return " * 100_000
    source.write_bytes(b"".join(json_lines([f"{n} {text}" for n in range(40)])))
    arguments = command(source, tmp_path / "out", model, "--workers", "2")
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        os.kill(wait_for_worker(process.pid), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: workers 2: one of them was killed")
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def wait_for_worker(pid: int) -> int:
    """Return a child of process `pid` that encodes."""
    for _ in range(600):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        time.sleep(0.05)
    raise AssertionError(f"process {pid} has no worker")
