"""The command line of `models.convert`: its options and their help."""

import argparse
import textwrap
from pathlib import Path
from typing import NoReturn

import torch

HUGGING_FACE, SKIPSTONE = KINDS = "hf", "skipstone"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_DESCRIPTION = """\
Convert a Llama with its tokenizer. The output appears when it is proven: all tensors read back bit
for bit, the same logits (transformers' where it is installed) and the same token ids. Needs memory
for the weights and one copy of them in fp32."""

_EXAMPLES = """\
examples:
  python -m models.convert --from hf --to skipstone Llama-3.2-1B outputs/llama3.2_1b \\
      --max_seq_len 8192
  python -m models.convert --from skipstone --to hf outputs/demo exports/demo --dtype bfloat16
  python -m models.convert --from skipstone --to hf outputs/demo exports/draft --first_layers 2
  python -m models.convert --from skipstone --to skipstone outputs/demo outputs/half \\
      --layers every_other
"""


class _Parser(argparse.ArgumentParser):
    """A parser that leaves the reporting of errors to `main`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}, see --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="python -m models.convert",
        description=textwrap.fill(_DESCRIPTION, 79),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from", dest="source", choices=KINDS, required=True, help="of INPUT")
    parser.add_argument("--to", dest="target", choices=KINDS, required=True, help="of OUTPUT")
    parser.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="Hugging Face folder with safetensors, or run folder (its newest checkpoint is read) "
        "or checkpoint folder",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder to make; must not exist or be empty"
    )
    parser.add_argument(
        "--dtype", choices=[*DTYPES], help="round the weights to this; as they are if not given"
    )
    parser.add_argument(
        "--max_shard_bytes",
        type=int,
        default=5_000_000_000,
        metavar="N",
        help="most bytes of one safetensors file (default: 5000000000)",
    )
    parser.add_argument(
        "--max_seq_len",
        type=int,
        metavar="N",
        help="context in tokens to write; the input's if not given. A preset's model must match",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece model or tokenizer.json (its tokenizer_config.json beside it); the "
        "input's if not given",
    )
    _add_layers_arguments(parser)
    return parser


def _add_layers_arguments(parser: argparse.ArgumentParser) -> None:
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument(
        "--first_layers",
        type=int,
        metavar="E",
        help="keep the first E layers alone: the exit of E layers, as a draft model",
    )
    layers.add_argument(
        "--layers", metavar="LAYERS", help="keep every_other layer, or those given, as 0,2,5"
    )
    parser.add_argument(
        "--drop_own_exits",
        action="store_true",
        help="leave out what exits have of their own: a plain Llama, the last layer as it is",
    )
