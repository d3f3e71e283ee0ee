"""The stages of a preparation: the same bytes for any pieces and tasks; what is missing is done."""

import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import data.pieces.key_ranges
import data.pieces.plan
import data.pieces.surveying
import data.stages
from data.preparation import prepare, prepare_stage
from data.prepare_config import PrepareConfig
from data.row_layout import RowLayout
from tests.data.test_preparation import files, read_back

REPOSITORY = Path(__file__).parents[2]


def write_corpus(folder: Path, documents: list[str]) -> Path:
    """Write files of every kind, with faults and repeated documents among them."""
    draw = random.Random(0)
    texts = [text * draw.randrange(1, 9) for text in draw.choices(documents, k=400)]
    lines = [json.dumps({"text": text, "short": text[:9]}).encode() for text in texts]
    for number in (7, 100, 101, 150, 151):
        lines[number] = draw.choice([b'{"text": "torn', b"", b'{"text": "\xff"}', b'{"text": " "}'])
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines[:160]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[160:260])))
    table = pyarrow.table({"text": [*texts[260:350], None], "short": ["a"] * 91})
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=20)
    for number, text in enumerate(texts[350:]):
        (folder / f"d{number:02d}.txt").write_text(text)
    (folder / "e.png").write_bytes(b"")
    return folder


def shrink(monkeypatch: pytest.MonkeyPatch, draw: random.Random) -> None:
    """Let pieces, kept text and ranges of keys be tiny."""
    for module, name, most in (
        (data.pieces.plan, "MOST_PIECE_BYTES", 9000),
        (data.pieces.surveying, "KEPT_TEXT_BYTES", 5000),
        (data.pieces.key_ranges, "KEYS_AT_ONCE", 90),
    ):
        monkeypatch.setattr(module, name, draw.randrange(20, most))


@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_are_the_same_for_any_pieces_tasks_and_workers(
    tmp_path: Path,
    tokenizer_path: Path,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    draw = random.Random(seed)
    names = [["a.jsonl", "b.jsonl.gz", "c.parquet"], [""]][seed % 2]
    corpus = write_corpus(tmp_path / "in", documents)
    config = PrepareConfig(
        input=tuple(str(corpus / name) for name in names),
        vocab_size=320 if seed else None,
        tokenizer=None if seed else tokenizer_path,
        validation_fraction=draw.choice([0.01, 0.3]),
        shard_tokens=draw.choice([100, 5000]),
        duplicates=draw.choice(["keep", "drop"]),
        layout=draw.choice([RowLayout(), RowLayout(prompt="{short}:", response="{text}")])
        if seed % 2 == 0
        else RowLayout(),
        max_skipped_fraction=1,
    )
    whole = prepare(config, tmp_path / "whole", workers=1)
    shrink(monkeypatch, draw)
    tasks = draw.choice([1, 2, 5])
    workers = 1 if seed else 2
    output = tmp_path / "out"
    assert prepare_stage(config, output, "survey", workers=workers) is None
    assert len([*tmp_path.glob(".out.*/pieces/*.json")]) > 7
    for task in draw.sample(range(tasks), tasks):
        prepare_stage(config, output, "encode", task=task, tasks=tasks, workers=workers)
    merged = prepare_stage(config, output, "merge", workers=workers)
    assert files(output) == files(whole.path)
    assert merged is not None
    assert merged.fingerprint == whole.fingerprint
    assert not [*tmp_path.glob(".*")]


def test_a_task_that_is_killed_is_repeated_alone(tmp_path: Path, tokenizer_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(8):
        (source / f"{n}.txt").write_text(f"{n} " + "self return " * 100_000)
    config = PrepareConfig(input=(str(source),), tokenizer=tokenizer_path)
    with pytest.raises(ValueError, match="run --stage survey first"):
        prepare_stage(config, output, "merge", workers=1)
    prepare_stage(config, output, "survey", workers=1)
    pieces = tmp_path / ".out.partial-tasks" / "pieces"
    command = [sys.executable, "-m", "data.prepare", "--input", str(source), "--output"]
    command += [str(output), "--tokenizer", str(tokenizer_path), "--workers", "1", "--stage"]
    second = ["encode", "--tasks", "2", "--task", "1"]
    with subprocess.Popen([*command, *second], cwd=REPOSITORY) as process:
        while not [*pieces.glob("*.encoded")]:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    early = {path: path.stat().st_mtime_ns for path in pieces.glob("*.encoded")}
    assert len(early) < 4
    with pytest.raises(
        ValueError,
        match="of 8 pieces .* --stage encode --tasks 2 again with --task 0 and 1$",
    ):
        prepare_stage(config, output, "merge", tasks=2, workers=1)
    for task in (0, 1):
        prepare_stage(config, output, "encode", task=task, tasks=2, workers=1)
    assert early == {path: path.stat().st_mtime_ns for path in early}
    other = replace(config, duplicates="drop")
    with pytest.raises(ValueError, match="made with other arguments, give the same to every stage"):
        prepare_stage(other, output, "merge", workers=1)
    merged = subprocess.run(
        [*command, "merge"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "next: torchrun" in merged.stdout
    prepare(config, tmp_path / "whole", workers=1)
    assert files(output) == files(tmp_path / "whole")
    prepare_stage(config, output, "encode", workers=1)  # is not begun again


def test_a_survey_of_input_that_has_changed_begins_again(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{"text": "two"}\n')
    config = PrepareConfig(input=(str(source),), tokenizer=tokenizer_path)
    prepare_stage(config, tmp_path / "out", "survey", workers=1)
    prepare_stage(config, tmp_path / "out", "encode", workers=1)
    source.write_text('{"text": "one"}\n{"text": "three"}\n')
    prepare_stage(config, tmp_path / "out", "survey", workers=1)
    with pytest.raises(ValueError, match=r"1 of 1 pieces are not encoded, .* --task 0$"):
        prepare_stage(config, tmp_path / "out", "merge", workers=1)
    prepare_stage(config, tmp_path / "out", "encode", workers=1)
    source.write_text('{"text": "one"}\n{"text": "seven"}\n')
    again = prepare_stage(config, tmp_path / "out", "merge", workers=1)
    prepare_stage(config, tmp_path / "other", "survey", workers=1)
    source.write_text('{"text": "one"}\n{"text": "nine"}\n')
    with pytest.raises(ValueError, match="input changed while it was read"):
        prepare_stage(config, tmp_path / "other", "encode", workers=1)
    assert again is not None
    assert sum(split.text_bytes for split in again.splits.values()) == len("onethree")
    with pytest.raises(ValueError, match="task 2 is not one of 2 tasks, give 0 to 1"):
        prepare_stage(config, tmp_path / "new", "encode", task=2, tasks=2, workers=1)


def test_near_duplicates_are_dropped_behind_the_first_whatever_the_pieces(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rensa")
    draw = random.Random(0)
    texts, expected = [], set()
    for n in range(60):
        words = draw.choices([f"w{i}" for i in range(500)], k=300)
        expected.add(" ".join(words))
        texts += [" ".join(words), " ".join(words)]
        words[150] = f"n{n}"  # 5 of 296 rows differ on each side: 0.967 are in common
        texts.append(" ".join(words))
        words[::20] = [f"n{n}"] * 15  # 75 more do: less than 0.6
        texts.append(" ".join(words))
        expected.add(texts[-1])
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = PrepareConfig(
        input=(str(source),), tokenizer=tokenizer_path, duplicates="near", validation_fraction=0.1
    )
    whole = prepare(config, tmp_path / "whole", workers=1)
    read = [text for split in ("train", "validation") for text in read_back(whole, split)]
    assert sorted(read) == sorted(expected)
    assert (whole.duplicates, whole.dropped_duplicates) == (120, True)
    shrink(monkeypatch, draw)
    assert files(prepare(config, tmp_path / "out", workers=1).path) == files(whole.path)
    other = replace(config, near_threshold=0.3)
    assert prepare(other, tmp_path / "other", workers=1).duplicates == 180
    trained = replace(config, tokenizer=None, vocab_size=300)
    monkeypatch.setattr(data.stages, "train_tokenizer", lambda sample, *_: sampled.extend(sample))
    sampled: list[str] = []
    with pytest.raises(ValueError, match="is not a file"):  # none is trained
        prepare(trained, tmp_path / "trained", workers=1)
    assert {*sampled} == {*read_back(whole, "train")}


def test_near_duplicates_without_the_library_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = PrepareConfig(input=("x",), vocab_size=300, duplicates="near", near_threshold=0)
    assert config.problems() == [
        "near_threshold 0 is not in (0, 1], try 0.8",
        "duplicates: rensa is not installed, pip install -e .[dedup]",
    ]
