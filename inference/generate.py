"""Continue texts: `python -m inference.generate --run DIR --prompt TEXT --strategy NAME`.

Text goes to stdout as it comes; strategy, legend and statistics to stderr.
"""

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.command_line import run_command
from data.option_values import read_as, read_path
from inference.cli.arguments import Count, DecodingOptions, SamplingOptions
from inference.cli.terminal import write_json
from inference.engine.counters import Counters, describe_drafts
from inference.engine.strategy import Strategy
from inference.loading.run import Run
from inference.strategies.registry import STRATEGIES, describe
from inference.text.continuation import Continuation, Provenance
from inference.text.model import BATCH_SIZE, Model
from inference.text.strategy_choice import choose_strategy
from inference.text.stream import TextStream

_COLORS: dict[Provenance, str] = {"accepted": "\033[32m", "corrected": "\033[33m"}
_RESET = "\033[0m"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions, DecodingOptions):
    r"""Continue texts, up to EOS.

    A single text is streamed. On a terminal, drafted tokens that were accepted are green, tokens
    the full model put after them yellow.

    Example:
      python -m inference.generate --run outputs/demo --prompt 'Once upon a time' \
        --strategy self_speculative --E 2 --d 4
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give the option again for more; - is standard input, less one newline at
    its end."""
    prompt_file: Annotated[Path, read_as("PATH", read_path)] | None = None
    """More texts to continue, one a line; of a .jsonl file, the field `prompt` of each line."""
    interactive: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue each line of standard input as it comes, until its end or Ctrl-C."""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read each text as a user's turn, through the chat template of the checkpoint."""
    chat_template: str | None = None
    """Likewise, through this template: a file, or chatml."""
    num_samples: Count = 1
    """Continuations of each text."""
    batch_size: Count = BATCH_SIZE
    """Texts decoded at once, if there are several."""
    strategy: Annotated[
        str | None,
        tyro.conf.arg(
            help="The fastest lossless one that inference.tune found, or else autoregressive, if"
            " not given; name or name:setting=value:setting=value, of "
            f"{', '.join(STRATEGIES)}; a name alone takes the threshold that inference.tune found"
            " for it."
        ),
    ] = None
    E: str | None = None
    """Layers run before the exit, for early_exit and self_speculative, which is the strategy if
    none is given; a quarter of the model's if not given."""
    d: str | None = None
    """Tokens drafted per round, for self_speculative, which is the strategy if none is given; 4 if
    not given."""
    max_new_tokens: Count = 100
    """Most tokens to add; a text ends earlier at EOS or at the end of the model's context."""


def read_prompts(options: GenerateOptions) -> list[str]:
    """Return the texts to continue.

    Raises:
        ValueError: There are none, or they cannot be read.
    """
    if options.interactive:
        if options.prompt or options.prompt_file is not None:
            raise ValueError("interactive: True, texts come from standard input, give no others")
        return []
    if not options.prompt and options.prompt_file is None:
        raise ValueError("prompt: none, give --prompt TEXT, --prompt_file PATH or --interactive")
    if options.prompt.count("-") > 1:
        raise ValueError("prompt: -, standard input can be read once, give other texts")
    texts = [
        sys.stdin.read().removesuffix("\n") if text == "-" else text for text in options.prompt
    ]
    if options.prompt_file is not None:
        texts += read_prompt_file(options.prompt_file)
    return texts


def read_prompt_file(path: Path) -> list[str]:
    """Return the texts of a file: its lines but empty ones, or the prompts in its JSON lines.

    Raises:
        ValueError: The file cannot be read, or holds no texts.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(
            f"prompt_file: {path} cannot be read ({error.strerror}), give another path"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"prompt_file: {path} is not valid UTF-8, give text") from None
    texts = [line for line in lines if line.strip()]
    if path.suffix == ".jsonl":
        texts = [*_prompts_of_json(path, lines)]
    if not texts:
        raise ValueError(f"prompt_file: {path} holds no prompt, write one a line")
    return texts


def _prompts_of_json(path: Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"prompt_file: {path}, line {number}, is no JSON object with a text `prompt`,"
                ' write {"prompt": "..."}'
            ) from None
        yield prompt


def printable(text: str) -> str:
    """Replace control characters: a model may write escape sequences byte by byte."""
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) != "Cc"
        else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def statistics_line(counters: Counters) -> str:
    """Return the counts of a run in one line."""
    line = (
        f"{counters.tokens} tokens, {counters.tokens_per_second:.1f} tokens/s, "
        f"{counters.layers_per_token:.2f} layers/token, prompt {counters.prefill_seconds:.3f} s"
    )
    if counters.acceptance_rate is not None:
        line += (
            f", acceptance {counters.acceptance_rate:.1%}, "
            f"{counters.tokens_per_round:.2f} tokens/verify"
        )
    return line


def show(stream: TextStream, num_samples: int) -> list[Continuation]:
    """Decode to the end, printing: one text as it comes, several as each ends, in their order."""
    if len(stream.prompts) == 1:
        _print_pieces(stream)
        found = [*stream.continuations()]
    else:
        found = []
        for continuation in stream.continuations():
            prompt, sample = divmod(len(found), num_samples)
            samples = f", sample {sample + 1}" if num_samples > 1 else ""
            text = printable(continuation.text) if sys.stdout.isatty() else continuation.text
            print(f"== prompt {prompt + 1}{samples}\n{continuation.prompt}{text}", flush=True)
            found.append(continuation)
    print(statistics_line(stream.counters), file=sys.stderr)
    if remark := stream.strategy.remark(stream.counters):
        print(remark, file=sys.stderr)
    return found


def _print_pieces(stream: TextStream) -> None:
    on_terminal = sys.stdout.isatty()
    colored = on_terminal and "NO_COLOR" not in os.environ
    print(stream.prompts[0], end="", flush=True)
    for piece in stream:
        text = printable(piece.text) if on_terminal else piece.text
        if colored and (color := _COLORS.get(piece.provenance)):
            text = f"{color}{text}{_RESET}"
        print(text, end="", flush=True)
    print(flush=True)
    if colored and stream.counters.drafted:
        print(*(f"{color}{name}{_RESET}" for name, color in _COLORS.items()), file=sys.stderr)


def converse(answer: Callable[[str], list[Continuation]]) -> list[Continuation]:
    """Answer each line of standard input until it ends or Ctrl-C; an error ends no conversation."""
    marker = ""
    if sys.stdin.isatty():
        marker = "> "
        with suppress(ImportError):  # input() then edits lines
            import readline  # noqa: F401
    found: list[Continuation] = []
    while True:
        try:
            if text := input(marker):
                found += answer(text)
        except (EOFError, KeyboardInterrupt):
            if marker:
                print(file=sys.stderr)
            return found
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def generate(options: GenerateOptions) -> None:
    """Continue every text; print and write what came of it."""
    texts = read_prompts(options)
    model = Model(options.open_run())
    rows = min(options.batch_size, max(1, len(texts)) * options.num_samples)
    strategy, note = choose_strategy(
        model.run,
        options.strategy,
        batch_size=rows,
        temperature=options.sampling.temperature,
        E=options.E,
        d=options.d,
    )

    def start(texts: Sequence[str]) -> TextStream:
        return model.stream(
            texts,
            strategy=strategy,
            max_new_tokens=options.max_new_tokens,
            **asdict(options.sampling),
            seed=options.seed,
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            chat=options.chat_template or options.chat,
        )

    stream = start(texts or [""])  # errors come before any output
    if note:
        print(note, file=sys.stderr)
    if options.interactive:
        found = converse(lambda text: show(start([text]), options.num_samples))
    else:
        found = show(stream, options.num_samples)
    write_json(options.json, result(options, model.run, strategy, found))


def result(
    options: GenerateOptions, run: Run, strategy: Strategy, found: Sequence[Continuation]
) -> dict[str, object]:
    """Return what --json writes; one text stands at the top, several are a list."""
    counters = Counters()
    for call in {
        id(continuation.counters): continuation.counters for continuation in found
    }.values():
        counters += call
    texts = [
        {
            "prompt": continuation.prompt,
            "text": continuation.text,
            "tokens": continuation.tokens,
            "provenance": continuation.provenance,
            "drafts": describe_drafts(continuation.drafts),
        }
        for continuation in found
    ]
    return {
        "checkpoint": str(run.checkpoint),
        "strategy": describe(strategy),
        "sampling": asdict(options.sampling),
        "seed": options.seed,
        **(texts[0] if len(texts) == 1 and not options.interactive else {"results": texts}),
        "counters": counters.content(),
    }


def main() -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text are refused as a prompt
        sys.stdin.reconfigure(errors="surrogateescape")
    run_command(GenerateOptions, generate, prog="python -m inference.generate")


if __name__ == "__main__":
    main()
