"""Where the prompts of a measurement come from: the run's held-out text, or a file."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.dataset import VALIDATION
from data.shards import TokenStream
from inference.cli.arguments import Parser
from inference.evaluation.tasks import TASKS, Example, Task, read_examples
from inference.loading.run import Run


def add_prompt_arguments(parser: Parser) -> None:
    """Add what says which prompts to decode, and how far."""
    parser.add_argument(
        "--prompts",
        type=int,
        default=8,
        help="number of prompts, held out or of a task; a --prompt_file gives all its lines",
    )
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        default=64,
        help="tokens of each held-out prompt; those of a file or a task are as long as they are",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="dataset to cut held-out prompts from; the run's if not given",
    )
    parser.add_argument(
        "--prompt_file", type=Path, metavar="PATH", help="take prompts from here, one on each line"
    )
    parser.add_argument(
        "--task", choices=[*TASKS], help="take prompts from --task_file, of this layout"
    )
    parser.add_argument(
        "--task_file",
        type=Path,
        metavar="PATH",
        help="local file of the task: .jsonl, .jsonl.gz, .tsv or .parquet",
    )
    parser.add_argument(
        "--shots",
        type=int,
        help="answered examples before each question, the first of the file;"
        " 1, for humaneval 0, if not given",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add to each")


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, where they are a task's, their answers."""

    prompts: list[list[int]]
    task: Task | None = None
    examples: Sequence[Example] = ()

    def scores(self, run: Run, continuations: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return the task's measures, means over the examples; none for plain prompts.

        An answer is a continuation up to EOS or a text the task ends answers at.
        """
        if self.task is None:
            return {}
        found = []
        for example, tokens in zip(self.examples, continuations, strict=True):
            ids = [*tokens, run.tokenizer.eos_id]
            text = run.tokenizer.decode(ids[: ids.index(run.tokenizer.eos_id)])
            found.append(self.task.score(example, self.task.cut(text)))
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


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


def prompts_from(run: Run, args: argparse.Namespace) -> list[list[int]]:
    """Return the prompts of `prompt_set_from` alone."""
    return prompt_set_from(run, args).prompts


def prompt_set_from(run: Run, args: argparse.Namespace) -> PromptSet:
    """Return what the arguments of `add_prompt_arguments` say.

    Raises:
        ValueError: there are not enough prompts, or the file is not what it should be.
    """
    if (args.task is None) != (args.task_file is None):
        raise ValueError("task, task_file: one is not given, give both or neither")
    if args.task is None and args.shots is not None:
        raise ValueError(f"shots: {args.shots}, only a task has them, give --task")
    if args.data is not None and (args.task is not None or args.prompt_file is not None):
        raise ValueError(f"data: {args.data}, the prompts are a file's, leave --data out")
    if args.task is not None:
        if args.prompt_file is not None:
            raise ValueError("prompt_file: there is a task_file too, give one of them")
        return _task_prompts(run, args)
    if args.prompt_file is None:
        stream = run.open_data(args.data).stream(VALIDATION)
        return PromptSet(held_out_prompts(stream, args.prompts, args.prompt_tokens))
    return PromptSet([_encode(run, line) for line in _read_lines(args.prompt_file)])


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


def _task_prompts(run: Run, args: argparse.Namespace) -> PromptSet:
    """Ask the first examples that fit, whole answers included, into the model's context."""
    task = TASKS[args.task]
    count = task.shots if args.shots is None else args.shots
    if count < 0 or args.prompts < 1:
        raise ValueError(f"shots: {count}, prompts: {args.prompts}, give at least 0 and at least 1")
    room = run.model.config.max_seq_len - args.max_new_tokens
    examples = read_examples(task, args.task_file)
    shots = list(islice(examples, count))
    prompts, asked, too_long = [], [], 0
    for example in examples:
        prompt = _encode(run, task.prompt(example, shots))
        if len(prompt) > room:
            too_long += 1
            continue
        prompts.append(prompt)
        asked.append(example)
        if len(prompts) == args.prompts:
            break
    if not prompts:
        raise ValueError(
            f"task_file: {args.task_file} has no example after {count} shots that fits, with "
            f"{args.max_new_tokens} new tokens, the context of {run.model.config.max_seq_len}: "
            f"{too_long} are too long, give fewer --shots or --max_new_tokens"
        )
    if too_long or len(prompts) < args.prompts:
        print(
            f"{args.task}: {len(prompts)} examples; {too_long} more leave less than "
            f"{args.max_new_tokens} of the model's {run.model.config.max_seq_len} tokens",
            file=sys.stderr,
        )
    return PromptSet(prompts, task, asked)
