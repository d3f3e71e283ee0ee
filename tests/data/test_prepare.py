"""The command line as a user meets it: exit codes, one line per error, the printed table."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_folder_becomes_a_dataset_with_a_table_and_json(
    tmp_path: Path, tokenizer_path: Path, documents: list[str]
) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for number, text in enumerate(documents):
        (source / f"{number:03d}.txt").write_text(text)
    (source / "bad.txt").write_bytes(b"one\n\xff\n")
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    common = ("--input", source, "--output", out, "--tokenizer", tokenizer_path)
    done = run(*common, "--workers", 2, "--json", summary)
    assert done.returncode == 0, done.stderr
    assert f"skipped 1: invalid UTF-8 ({source}/bad.txt:2)" in done.stderr
    assert "skipped 1: invalid UTF-8" in done.stdout
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    written = json.loads(summary.read_text())
    sizes = written["splits"]
    assert sizes["train"]["documents"] + sizes["validation"]["documents"] == len(documents)
    assert sum(s["text_bytes"] for s in sizes.values()) == sum(len(d.encode()) for d in documents)
    for name in ("train", "validation"):
        assert table[name][:2] == [f"{sizes[name][key]:,}" for key in ("documents", "tokens")]
    assert written["skipped"] == {"invalid UTF-8": 1}
    again = run(*common)
    assert again.returncode == 0
    assert "already there" in again.stderr
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent"], "input absent does not exist, give"),
        (["--input", "{tmp}/empty"], "input holds no documents, give"),
        (["--input", "{tmp}/one.txt"], "1 different document, too short to be split"),
        (["--input", "{tmp}/two"], "vocab_size 4096 is too large for this text"),
        (["--input", "{tmp}/two", "--tokenizer", "absent.model"], "tokenizer absent.model is not"),
        (["--input", "{tmp}/two", "--tokenizer", "a", "--vocab_size", "9"], "give exactly one of"),
        (["--input", "{tmp}/two", "--validation_fraction", "1"], "validation_fraction 1.0 is not"),
        (["--input", "{tmp}/two", "--workers", "0"], "workers 0 is below 1"),
        (["--input", "{tmp}/two", "--vocab_size", "x"], "error: vocab_size: "),
        (["--input", "{tmp}/two", ""], "input: empty, name files or folders"),
        (["--input", "{tmp}/two", "--vocab_size", "0"], "vocab_size: 0, give 260 to 16777216"),
        (["--vocab_size", "300"], "input: none, give --input PATH [PATH ...]"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for path in ("two/a.txt", "two/b.txt"):
        (tmp_path / path).write_text(path)
    (tmp_path / "one.txt").write_text("x")
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    done = run(*filled, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_help_names_every_option_and_default() -> None:
    done = run("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    for word in ("embedded", ".csv", "default: 0.01", "4096", "--overwrite", r"\nA:'"):
        assert word in text


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_its_group_ends_it_with_one_line_and_no_folder(
    tmp_path: Path, tokenizer_path: Path, name: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words of a text"}\n' * 200_000)
    words = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--workers", 2]
    with subprocess.Popen(
        [sys.executable, "-m", "data.prepare", *map(str, words), "--tokenizer", tokenizer_path],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert "reading" in process.stderr.readline()  # the workers start
        os.killpg(process.pid, getattr(signal, name))
        lines = process.stderr.read().splitlines()
    assert lines == ["interrupted" if name == "SIGINT" else "terminated"]
    assert process.returncode == 128 + getattr(signal, name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_of_token_ids_are_said_to_be_such(tmp_path: Path, tokenizer_path: Path, kind) -> None:
    rows = [{"input_ids": [5, 6, 7]}] * 50
    source = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("\n".join(map(json.dumps, rows)))
    done = run("--input", source, "--output", tmp_path / "out", "--tokenizer", tokenizer_path)
    assert done.returncode == 2
    assert "give one of" not in done.stderr
    wanted = (
        "name its token ids as tokens_field"
        if kind == "parquet"
        else "no field 'text', nor any text"
    )
    assert wanted in done.stderr
