"""Tasks: files of each layout, prompts, and scores worked by hand."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inference.evaluation.tasks import TASKS, Example, code_match, exact_match, read_examples, rouge

RECORDS = [{"document": f"Rain fell {i}.", "summary": f"Wet {i}."} for i in range(3)]
EXAMPLES = [Example(f"Rain fell {i}.", f"Wet {i}.") for i in range(3)]


def test_every_kind_of_file_is_read(tmp_path):
    lines = "\n".join(map(json.dumps, RECORDS)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    cells = ["\t".join(record.values()) for record in RECORDS]
    (tmp_path / "a.tsv").write_text("\n".join(["document\tsummary", *cells]))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.tsv"):
        assert list(read_examples(TASKS["xsum"], tmp_path / name)) == EXAMPLES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1: no JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("a.jsonl", '{"document": ' + "1" * 5_000 + "}", "line 1: no JSON"),
        ("b/a.jsonl", None, "cannot be read"),
        ("b/a.parquet", None, "cannot be read"),
        ("a.jsonl", '{"document": "x"}', "line 1: no text in 'summary', give records with"),
        ("a.jsonl", "[1]", "no text in 'document'"),
        ("a.tsv", "document\tsummary\nonly one", "line 2: 1 columns but the first line names 2"),
        ("a.parquet", "no", "give a whole Parquet file"),
        ("a.csv", "", "is of no known kind"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_examples(TASKS["xsum"], tmp_path / name))
    assert str(caught.value).startswith("task_file: ")


def test_prompts_are_laid_out_as_published():
    shown = TASKS["cnn_dm"].prompt(Example("B b.", "?"), [Example("A a.", "A.")])
    assert shown == "Article: A a.\nSummary: A.\nArticle: B b.\nSummary:"
    assert TASKS["humaneval"].prompt(Example("def f():\n", "?"), []) == "def f():\n"
    assert TASKS["topv2"].prompt(Example("go", "?"), []) == "Utterance: go\nParse:"
    assert TASKS["topv2"].cut(" [IN:X ]\nUtterance: more") == " [IN:X ]"
    assert TASKS["humaneval"].cut("  return 1\n\ndef g():\nclass") == "  return 1\n"
    assert TASKS["xsum"].cut("no end") == "no end"


def test_rouge_of_worked_numbers():
    scores = rouge(Example("", "The cat sat on the mat."), "the cat ate the mat")
    # words: the x2, cat, mat common of 5 and 6; pairs: the-cat, the-mat of 4 and 5;
    # subsequence: the cat the mat
    assert scores["rouge1"] == pytest.approx(2 * 4 / 11)
    assert scores["rouge2"] == pytest.approx(2 * 2 / 9)
    assert scores["rougeL"] == pytest.approx(2 * 4 / 11)
    assert set(rouge(Example("", "a"), "").values()) == {0.0}
    assert rouge(Example("", "a b c"), "c b a")["rougeL"] == pytest.approx(1 / 3)


def test_code_is_compared_and_never_run(tmp_path):
    prompt = "def f(x):\n"
    right = "    return x + 1\n"
    assert code_match(Example(prompt, right), right + "\n") == {
        "exact": 1.0, "prefix": 1.0, "parses": 1.0,
    }  # fmt: skip
    half = code_match(Example(prompt, right), "    return x - (")
    assert half["exact"] == half["parses"] == 0.0
    assert half["prefix"] == pytest.approx(5 / 8)  # blanks, return, blank, x, blank of 8
    path = tmp_path / "ran"
    code_match(Example("", "x"), f"open({str(path)!r}, 'w')")
    assert not path.exists()


def test_parses_are_equal_whatever_their_white_space():
    example = Example("", "[IN:GET_X [SL:Y a ] ]")
    assert exact_match(example, " [IN:GET_X  [SL:Y a ] ]\n") == {"exact": 1.0}
    assert exact_match(example, "[IN:GET_X ]") == {"exact": 0.0}
