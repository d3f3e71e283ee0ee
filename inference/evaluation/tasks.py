"""Tasks with known answers, in the layouts they are published in, and scores of answers.

Files are local, and code in them is never run. Imports no model and no tokenizer.
"""

import ast
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data.foreign_json import parse

_LAYOUTS = ".jsonl, .jsonl.gz, .tsv or .parquet"


@dataclass(frozen=True)
class Example:
    """One question and its answer, as text."""

    source: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """The fields of a kind of file, the layout of its prompts, and the score of an answer."""

    source: str
    """Field that holds the question."""
    answer: str
    """Field that holds the answer."""
    question: str
    """A prompt, with {source} in it."""
    answered: str
    """What follows a prompt in an example with its answer, with {answer} in it."""
    shots: int
    """Examples with their answers before the question, unless the user gives a number."""
    ends: tuple[str, ...]
    """Texts an answer ends before."""
    score: Callable[[Example, str], dict[str, float]]
    """Rates an answer, from 0 to 1, by the names of the measures."""

    def prompt(self, example: Example, shots: Sequence[Example]) -> str:
        """Return the text to continue: the shots with their answers, then the question."""
        answered = [
            self.question.format(source=shot.source) + self.answered.format(answer=shot.answer)
            for shot in shots
        ]
        return "".join([*answered, self.question.format(source=example.source)])

    def cut(self, text: str) -> str:
        """Return a continuation up to where its answer ends."""
        return text[: min((at for end in self.ends if (at := text.find(end)) >= 0), default=None)]


def rouge(example: Example, answer: str) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of an answer.

    Each is F = 2 P R / (P + R) with P = m / (answer's count) and R = m / (reference's count), where
    m is the number of common n-grams, each as often as in both (ROUGE-N), or the length of the
    longest common subsequence of words (ROUGE-L, a text as one sequence). Words are runs of a-z and
    0-9 in lower case; there is no stemming.
    """
    ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, example.answer))
    found = {}
    for n in (1, 2):
        a, b = (Counter(zip(*(words[i:] for i in range(n)))) for words in (ours, theirs))  # noqa: B905
        found[f"rouge{n}"] = _f_measure((a & b).total(), a.total(), b.total())
    found["rougeL"] = _f_measure(_common_subsequence(ours, theirs), len(ours), len(theirs))
    return found


def _f_measure(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0  # 2 P R / (P + R), shortened


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for word in a:
        above = 0  # of the row before, one to the left
        for j, other in enumerate(b, start=1):
            above, lengths[j] = (
                lengths[j],
                above + 1 if word == other else max(lengths[j], lengths[j - 1]),
            )
    return lengths[-1]


def code_match(example: Example, answer: str) -> dict[str, float]:
    """Compare a completion with the canonical one; nothing is run.

    exact: they are equal but for white space at the end. prefix: share of the canonical solution's
    tokens (words, signs, runs of blanks) that the completion begins with. parses: prompt and
    completion are a Python program.
    """
    ours, theirs = (re.findall(r"\w+|[^\w\s]|\s+", t.rstrip()) for t in (answer, example.answer))
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    try:
        ast.parse(example.source + answer)
        parses = True
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of them ast.parse raises
        parses = False
    return {
        "exact": float(ours == theirs),
        "prefix": same / max(1, len(theirs)),
        "parses": float(parses),
    }


def exact_match(example: Example, answer: str) -> dict[str, float]:
    """Return whether two parses are equal, white space counted once."""
    return {"exact": float(answer.split() == example.answer.split())}


def _summary(source: str, answer: str) -> Task:
    return Task(
        source=source,
        answer=answer,
        question="Article: {source}\nSummary:",
        answered=" {answer}\n",
        shots=1,
        ends=("\nArticle:",),
        score=rouge,
    )


TaskName = Literal["cnn_dm", "xsum", "humaneval", "topv2"]

TASKS: Mapping[TaskName, Task] = {
    "cnn_dm": _summary("article", "highlights"),
    "xsum": _summary("document", "summary"),
    "humaneval": Task(
        source="prompt",
        answer="canonical_solution",
        question="{source}",
        answered="{answer}\n",
        shots=0,
        ends=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        score=code_match,
    ),
    "topv2": Task(
        source="utterance",
        answer="semantic_parse",
        question="Utterance: {source}\nParse:",
        answered=" {answer}\n",
        shots=1,
        ends=("\n",),
        score=exact_match,
    ),
}
"""CNN/DailyMail, XSUM, HumanEval (arXiv 2107.03374, its stop texts) and TOPv2."""


def read_examples(task: Task, path: Path) -> Iterator[Example]:
    """Yield a file's examples.

    Raises:
        ValueError: a record cannot be read or lacks a field, or the file is none of the kinds.
    """
    for position, record in _records(path):
        texts = record if isinstance(record, Mapping) else {}
        for name in (task.source, task.answer):
            if not isinstance(texts.get(name), str):
                raise ValueError(
                    f"task_file: {path}, {position}: no text in {name!r}, give records with "
                    f"{task.source} and {task.answer}"
                )
        yield Example(texts[task.source], texts[task.answer])


def _records(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
    elif path.suffix == ".tsv":
        yield from _tsv_records(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, line in _lines(path):
            try:
                yield f"line {number}", parse(line.encode())
            except ValueError as error:
                raise ValueError(
                    f"task_file: {path}, line {number}: no JSON ({error}), give one record on each "
                    "line"
                ) from None
    else:
        raise ValueError(f"task_file: {path} is of no known kind, give {_LAYOUTS}")


def _tsv_records(path: Path) -> Iterator[tuple[str, object]]:
    names: list[str] = []
    for number, line in _lines(path):
        cells = line.rstrip("\r\n").split("\t")
        names = names or cells
        if len(cells) != len(names):
            raise ValueError(
                f"task_file: {path}, line {number}: {len(cells)} columns but the first line names "
                f"{len(names)}, separate them with one tab each"
            )
        if cells is not names:
            yield f"line {number}", dict(zip(names, cells, strict=True))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, and their numbers from 1."""
    number = 0
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"task_file: {path}, after line {number}: {error}, give UTF-8 text"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"task_file: {path} cannot be read ({error.strerror or error}), give another path"
    )


def _parquet_records(path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except OSError as error:
        raise _unreadable(path, error) from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"task_file: {path}, after row {number}: {error}, give a whole Parquet file"
        ) from None
