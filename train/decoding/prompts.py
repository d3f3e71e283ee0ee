"""The held-out prompts that are continued while a model trains: of text, of pairs or of a task."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.boundaries import Boundaries
from data.foreign_json import MAX_BYTES, parse_object
from data.shards import NO_LOSS
from data.tokenizer import Tokenizer
from data.windows import Windows, spread
from train.decoding.speculation_config import SpeculationConfig


@dataclass(frozen=True)
class Prompt:
    """One prompt, and its answer where it has one."""

    tokens: tuple[int, ...]
    answer: str | None = None
    answer_tokens: int = 0
    """Tokens of the answer, its end included."""


def new_tokens(config: SpeculationConfig, context: int) -> int:
    """Return the tokens of a continuation, at most half of the context; 0: there is no room."""
    return min(config.new_tokens, context // 2)


def read_prompts(
    config: SpeculationConfig,
    windows: Windows,
    boundaries: Boundaries,
    tokenizer: Tokenizer,
    *,
    pairs: bool,
    context: int,
) -> list[Prompt]:
    """Return the prompts of a run, the same at every start; at least one.

    Args:
        config: How many, and of what.
        windows: The held-out sequences.
        boundaries: Of their documents.
        tokenizer: Of the dataset.
        pairs: Whether the sequences are of pairs, whose prompts are not learnt.
        context: Most tokens of a row.

    Raises:
        ValueError: The task's file cannot be read, or no example fits.
    """
    new = new_tokens(config, context)
    if config.task:
        return _of_task(config, tokenizer, new, context - new)
    found = _of_pairs(config, windows, boundaries, tokenizer) if pairs else []
    if found := [each for each in found if _fits(each, new, context - new)]:
        return found[: config.prompts]
    length = max(1, min(config.prompt_tokens, context - new))
    numbers = spread(windows, config.prompts)
    return [Prompt(tuple(windows.read(i)[0][:length].tolist())) for i in numbers]


def _of_pairs(
    config: SpeculationConfig, windows: Windows, boundaries: Boundaries, tokenizer: Tokenizer
) -> list[Prompt]:
    """Return the first whole pair of each of some windows, spread over the split."""
    found = []
    for i in spread(windows, 4 * config.prompts):
        tokens, labels = windows.read(i)
        starts, learnt = np.flatnonzero(boundaries.starts(tokens)), labels != NO_LOSS
        if not len(starts) or not learnt[starts[0] :].any():
            continue
        first = int(starts[0] + np.argmax(learnt[starts[0] :]))
        length = int(np.argmin(learnt[first:]))
        if not length:  # it goes on behind the window
            continue
        begin = starts[starts <= first][-1]
        answer = tuple(labels[first : first + length].tolist())
        prompt = tuple(tokens[begin : first + 1].tolist())
        found.append(Prompt(prompt, tokenizer.decode([*answer]), len(answer)))
    return found


def _of_task(
    config: SpeculationConfig, tokenizer: Tokenizer, new: int, longest: int
) -> list[Prompt]:
    """Return the first examples of the file that fit."""
    read, found = 0, []
    for prompt, answer in _examples(Path(config.task)):
        read += 1
        tokens = (tokenizer.bos_id, *tokenizer.encode(prompt))
        example = Prompt(tokens, answer, len(tokenizer.encode(answer)) + 1)
        found += [example] if _fits(example, new, longest) else []
        if len(found) == config.prompts:
            break
    if not found:
        raise ValueError(
            f"speculation.task: {config.task} has no example among {read} with an answer of at "
            f"most {new} tokens and a prompt of {longest}, give shorter ones, or raise "
            "speculation.new_tokens or model.max_seq_len"
        )
    return found


def _fits(prompt: Prompt, new: int, longest: int) -> bool:
    return prompt.answer_tokens <= new and len(prompt.tokens) <= longest


_MOST_EXAMPLES = 100_000
"""Lines of a task's file that are looked at."""


def _examples(path: Path) -> Iterator[tuple[str, str]]:
    """Yield prompt and answer of every line.

    Raises:
        ValueError: Naming the line that is none.
    """
    number = 0
    try:
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(MAX_BYTES + 1), b"")
            for line in islice(lines, _MOST_EXAMPLES):
                number += 1
                if line.strip():
                    yield _example(line)
    except OSError as error:
        raise ValueError(
            f"speculation.task: {path} cannot be read ({error.strerror}), give a file of JSON lines"
        ) from None
    except ValueError as error:
        raise ValueError(f"speculation.task: {path}, line {number}: {error}") from None


def _example(line: bytes) -> tuple[str, str]:
    record = parse_object(line)
    prompt, answer = record.get("prompt"), record.get("answer")
    if not (isinstance(prompt, str) and isinstance(answer, str)):
        raise ValueError('no text in "prompt" and "answer", give both in every line')
    (prompt + answer).encode()  # raises a ValueError for what is no Unicode
    return prompt, answer


def is_answered(answer: str, text: str) -> bool:
    """Whether a continuation, up to its end, is the answer, white space counted once.

    A model that does not end its answers goes on: of an answer of one line, the first line counts.
    """
    if "\n" not in answer.strip():
        text = (text.strip().splitlines() or [""])[0]
    return text.split() == answer.split()
