"""Where the prompts of a measurement come from: the run's held-out text, or a file."""

import argparse
from pathlib import Path

from data.dataset import VALIDATION
from data.shards import TokenStream
from inference.cli import Parser
from inference.run import Run


def add_prompt_arguments(parser: Parser) -> None:
    """Add what says which prompts to decode, and how far."""
    parser.add_argument("--prompts", type=int, default=8, help="number of held-out prompts")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="tokens of each of them")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="dataset to cut them from; the run's if not given"
    )
    parser.add_argument(
        "--prompt_file", type=Path, metavar="PATH", help="take prompts from here, one on each line"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add to each")


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
    """Return the prompts that `add_prompt_arguments` read of.

    Raises:
        ValueError: there are not enough.
    """
    if args.prompt_file is None:
        stream = run.open_data(args.data).stream(VALIDATION)
        return held_out_prompts(stream, args.prompts, args.prompt_tokens)
    lines = [line for line in args.prompt_file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompt_file: {args.prompt_file} is empty, give one prompt on each line")
    return [[run.tokenizer.bos_id, *run.tokenizer.encode(line)] for line in lines]
