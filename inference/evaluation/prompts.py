"""The prompts of a measurement: from the run's held-out text, or from a file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from data.dataset import VALIDATION
from data.shards import TokenStream
from data.tokenizer import Tokenizer
from inference.cli.arguments import Count, Folder
from inference.evaluation.tasks import TASKS, Example, Task, TaskName, read_examples
from inference.loading.run import Run


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Which prompts to decode, and how far."""

    prompts: Count = 8
    """Number of prompts, held out or of a task; a --prompt_file gives all its lines."""
    prompt_tokens: Count = 64
    """Tokens of each held-out prompt; those of a file or a task are as long as they are."""
    data: Folder | None = None
    """Dataset to cut held-out prompts from; the run's if not given."""
    prompt_file: Path | None = None
    """Take prompts from here, one on each line."""
    task: TaskName | None = None
    """Take prompts from --task_file, of this layout."""
    task_file: Path | None = None
    """Local file of the task: .jsonl, .jsonl.gz, .tsv or .parquet."""
    shots: int | None = None
    """Answered examples before each question, the first of the file; the task's own if None."""
    max_new_tokens: Count = 128
    """Most tokens to add to each."""
    ignore_eos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on after EOS, so that all continuations have --max_new_tokens; else they end there, as in
    generation."""

    def stop_tokens(self, run: Run) -> tuple[int, ...]:
        """Return the ids that end a continuation."""
        return () if self.ignore_eos else run.stop_tokens


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, where they are a task's, their answers."""

    prompts: list[list[int]]
    task: Task | None = None
    examples: Sequence[Example] = ()

    def scores(self, run: Run, continuations: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return the task's measures, means over the examples; none for plain prompts.

        An answer is a continuation up to EOS or a text the task ends answers at. past_end: share of
        the tokens that lie behind such a text, where rows go on.
        """
        if self.task is None:
            return {}
        found = []
        for example, tokens in zip(self.examples, continuations, strict=True):
            ids = [*tokens, run.tokenizer.eos_id]
            ids = ids[: ids.index(run.tokenizer.eos_id)]
            answer = self.task.cut(run.tokenizer.decode(ids))
            past_end = _share_past_end(self.task, run.tokenizer, ids)
            found.append({**self.task.score(example, answer), "past_end": past_end})
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def _share_past_end(task: Task, tokenizer: Tokenizer, ids: Sequence[int]) -> float:
    """Return the share of tokens behind the first text that ends an answer."""
    texts = (tokenizer.decode([*ids[:n]]) for n in range(1, len(ids) + 1))
    ended = next((n for n, text in enumerate(texts, 1) if task.cut(text) != text), len(ids))
    return 1 - ended / len(ids) if ids else 0.0


def held_out_prompts(stream: TokenStream, count: int, tokens: int) -> list[list[int]]:
    """Cut `count` windows of `tokens` tokens, evenly spread, out of a stream.

    Raises:
        ValueError: the stream is too short for windows that do not overlap.
    """
    if count < 1 or tokens < 1:
        raise ValueError(f"prompts: {count} of prompt_tokens: {tokens}, give at least 1 of each")
    if count * tokens > len(stream):
        raise ValueError(
            f"prompts: {count} of {tokens} tokens need {count * tokens} held-out tokens but there "
            f"are {len(stream)}, give fewer or shorter ones"
        )
    return [stream.read(i * (len(stream) // count), tokens).tolist() for i in range(count)]


def prompts_from(run: Run, options: PromptOptions) -> list[list[int]]:
    """Return the prompts of `prompt_set_from` alone."""
    return prompt_set_from(run, options).prompts


def prompt_set_from(run: Run, options: PromptOptions) -> PromptSet:
    """Return the prompts that the options name.

    Raises:
        ValueError: There are not enough prompts, or the file is not what it should be.
    """
    data, file, task, task_file = options.data, options.prompt_file, options.task, options.task_file
    if (task is None) != (task_file is None):
        raise ValueError("task, task_file: one is not given, give both or neither")
    if task is None and options.shots is not None:
        raise ValueError(f"shots: {options.shots}, only a task has them, give --task")
    if data is not None and (task is not None or file is not None):
        raise ValueError(f"data: {data}, the prompts are a file's, leave --data out")
    if task is not None and file is not None:
        raise ValueError("prompt_file: there is a task_file too, give one of them")
    if task is not None and task_file is not None:
        return _task_prompts(run, task, task_file, options)
    if file is not None:
        return PromptSet([_encode(run, line) for line in _read_lines(file)])
    stream = run.open_data(data).stream(VALIDATION)
    return PromptSet(held_out_prompts(stream, options.prompts, options.prompt_tokens))


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"prompt_file: {path} is not UTF-8, give text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"prompt_file: {path} cannot be read ({error.strerror})") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompt_file: {path} is empty, give one prompt on each line")
    return lines


def _encode(run: Run, text: str) -> list[int]:
    return [run.tokenizer.bos_id, *run.tokenizer.encode(text)]


def _task_prompts(run: Run, name: TaskName, file: Path, options: PromptOptions) -> PromptSet:
    """Return the first examples that fit, whole answers included, into the model's context."""
    task, context, new = TASKS[name], run.model.config.max_seq_len, options.max_new_tokens
    count = task.shots if options.shots is None else options.shots
    if count < 0:
        raise ValueError(f"shots: {count}, give at least 0")
    unread = read_examples(task, file)
    shots = list(islice(unread, count))
    prompts, examples, too_long = [], [], 0
    for example in unread:
        prompt = _encode(run, task.prompt(example, shots))
        if len(prompt) > context - new:
            too_long += 1
            continue
        prompts.append(prompt)
        examples.append(example)
        if len(prompts) == options.prompts:
            break
    if not prompts:
        raise ValueError(
            f"task_file: {file} has no example after {count} shots that fits, with {new} new "
            f"tokens, the context of {context}: {too_long} are too long, give fewer --shots or "
            f"--max_new_tokens"
        )
    if too_long or len(prompts) < options.prompts:
        print(
            f"{name}: {len(prompts)} examples; {too_long} more leave less than {new} of the "
            f"model's {context} tokens",
            file=sys.stderr,
        )
    return PromptSet(prompts, task, examples)
