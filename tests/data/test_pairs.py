"""Prompts and responses: what is read of them, how they are stored, and what has a loss."""

import json
import sys
from pathlib import Path

import pytest

from data import prepare as command
from data.dataset import verify_shards
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.row_layout import RowLayout
from data.shards import NO_LOSS
from data.tokenizer import Tokenizer

LAYOUT = RowLayout(prompt="Q: {question}\nA:", response=" {answer}")


def pairs(count: int) -> list[dict[str, str]]:
    return [{"question": f"is {n} odd", "answer": "yes" if n % 2 else "no"} for n in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_response_and_eos_alone_are_learnt(
    tmp_path: Path, tokenizer_path: Path, kind: str, workers: int
) -> None:
    rows = pairs(40)
    source = write(tmp_path / "pairs.jsonl", rows)
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = tmp_path / "pairs.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    config = PrepareConfig(
        input=(str(source),),
        tokenizer=tokenizer_path,
        layout=LAYOUT,
        validation_fraction=0.2,
        shard_tokens=200,
    )
    dataset = prepare(config, tmp_path / "out", workers=workers)
    assert dataset.holds_pairs
    verify_shards(dataset)
    tokenizer = Tokenizer(tokenizer_path)
    found = []
    for split in ("train", "validation"):
        stream = dataset.stream(split)
        tokens, targets = stream.read_targets(0, len(stream))
        bos = [*(tokens == tokenizer.bos_id).nonzero()[0], len(stream)]
        for begin, end in zip(bos, bos[1:], strict=False):
            document, learnt = tokens[begin:end].tolist(), targets[begin:end].tolist()
            at = next(i for i, target in enumerate(learnt) if target != NO_LOSS)
            assert learnt == [NO_LOSS] * at + document[at:]
            assert document[-1] == tokenizer.eos_id
            prompt = tokenizer.decode(document[1:at])
            assert document[1:at] == tokenizer.encode(prompt), "as it is for generation"
            found.append((prompt, tokenizer.decode(document[at:-1])))
    expected = {(f"Q: {row['question']}\nA:", f" {row['answer']}") for row in rows}
    assert set(found) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_after_an_empty_prompt_the_response_and_eos_alone_are_learnt(
    tmp_path: Path, tokenizer_path: Path, workers: int
) -> None:
    rows = [{"prompt": "ask" * (n % 2), "response": f"answer {n}"} for n in range(40)]
    layout = RowLayout(prompt="{prompt}", response="{response}")
    config = PrepareConfig(
        input=(str(write(tmp_path / "pairs.jsonl", rows)),), tokenizer=tokenizer_path, layout=layout
    )
    dataset = prepare(config, tmp_path / "out", workers=workers)
    tokenizer = Tokenizer(tokenizer_path)
    responses = []
    for split in ("train", "validation"):
        stream = dataset.stream(split)
        tokens, targets = stream.read_targets(0, len(stream))
        bos = tokens == tokenizer.bos_id
        assert (targets[bos] == NO_LOSS).all()
        learnt = targets[targets != NO_LOSS].tolist()
        for _ in range(int(bos.sum())):
            end = learnt.index(tokenizer.eos_id)
            responses.append(tokenizer.decode(learnt[:end]))
            learnt = learnt[end + 1 :]
        assert learnt == []
    assert sorted(responses) == sorted(row["response"] for row in rows)


def test_pairs_without_a_response_are_counted_and_many_refused(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    def prepared(rows: list[dict], name: str):
        source = write(tmp_path / f"{name}.jsonl", rows)
        config = PrepareConfig(input=(str(source),), tokenizer=tokenizer_path, layout=LAYOUT)
        return prepare(config, tmp_path / name, workers=1)

    dataset = prepared([*pairs(40), {"question": "why"}, {"question": "how", "answer": " "}], "few")
    assert dataset.skipped == {"empty response": 1, "no field 'answer'": 1}
    with pytest.raises(
        ValueError,
        match=r"20 of 40 documents cannot be used.*no field 'answer'.* right prompt and response,",
    ):
        prepared([*pairs(20), *({"question": str(n)} for n in range(20))], "many")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (RowLayout(prompt="{question}"), "prompt '{question}' has no response, give both"),
        (RowLayout(response="{answer}"), "prompt '' names no field, write one like {prompt}"),
        (RowLayout(prompt="{q}", response="yes"), "response 'yes' names no field"),
        (RowLayout(prompt="{}", response="{a}"), "prompt '{}' names"),
        (RowLayout(prompt="{q.x}", response="{a}"), "give names of fields alone"),
        (RowLayout(prompt="{q", response="{a}"), "prompt '{q' is no format string"),
    ],
)
def test_a_layout_that_makes_no_pairs_is_refused(layout: RowLayout, message: str) -> None:
    [problem] = PrepareConfig(input=("x",), vocab_size=300, layout=layout).problems()
    assert message in problem


def test_text_files_have_no_pairs_and_one_pair_cannot_be_split(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    for source, message in (
        (tmp_path / "a.txt", "has no fields to make pairs of"),
        (write(tmp_path / "one.jsonl", pairs(1)), "holds 1 different pair, give one more"),
    ):
        config = PrepareConfig(input=(str(source),), tokenizer=tokenizer_path, layout=LAYOUT)
        with pytest.raises(ValueError, match=message):
            prepare(config, tmp_path / "out", workers=1)


def test_the_command_takes_new_lines_as_they_are_typed(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "pairs.jsonl", pairs(30))
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), "--workers", "1"]
    arguments += ["--tokenizer", str(tokenizer_path), "--prompt", r"Q: {question}\nA:"]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments, "--response", " {answer}"])
    command.main()
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["arguments"]["prompt"] == "Q: {question}\nA:"
    command.main()  # the same arguments find it there


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (RowLayout(prompt="{asked}", response="{answer}"), "prompt field asked is no column of "),
        (RowLayout(prompt="{question}", response="{said}"), "response field said is no column of "),
        (RowLayout(prompt="{question}", response="{number}"), "response field number of .* int64"),
        (RowLayout(text_field="said"), "text_field said is no column of "),
    ],
)
def test_a_column_that_is_missing_is_named_with_its_option(
    tmp_path: Path, tokenizer_path: Path, layout: RowLayout, named: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"number": 1} for row in pairs(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    source = (str(tmp_path / "pairs.parquet"),)
    config = PrepareConfig(input=source, tokenizer=tokenizer_path, layout=layout)
    with pytest.raises(ValueError, match=named):
        prepare(config, tmp_path / "out", workers=1)
