"""The command that turns text into a dataset: `python -m data.prepare --help`."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import NoReturn

from data.dataset import Dataset
from data.preparation import (
    DEFAULT_MAX_SKIPPED_FRACTION,
    DEFAULT_SHARD_TOKENS,
    DEFAULT_VALIDATION_FRACTION,
    PrepareConfig,
    prepare,
)
from data.row_layout import RowLayout
from data.sources import SUFFIXES

DEFAULT_VOCAB_SIZE = 4096

_EXAMPLES = """\
examples:
  python -m data.prepare --input embedded --output datasets/embedded --vocab_size 2048
  python -m data.prepare --input 'books/*.txt' more.jsonl.gz --output datasets/books
  python -m data.prepare --input news.parquet --text_field body --output datasets/news \\
      --tokenizer datasets/books/tokenizer.model
  python -m data.prepare --input pairs.jsonl --prompt 'Q: {question}\nA:' --response ' {answer}' \\
      --output datasets/pairs --tokenizer datasets/books/tokenizer.model
  python -m data.prepare --input hf:saved_folder:train --output datasets/more \\
      --tokenizer Llama-3.2-1B/tokenizer.json
"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports a fault in one line, as every fault is reported here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}, see --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = _Parser(
        prog="python -m data.prepare",
        description="Turn text into a folder of token shards with a held-out validation split.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input_options(parser)
    _add_output_options(parser)
    return parser


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files ({' '.join(SUFFIXES)}), folders (recursive, without hidden entries), globs, "
        "or the word embedded: the sources of the running Python and of torch, about 58 MB that "
        "need no download, or hf:NAME[:SPLIT[:CONFIG]]: a Hugging Face dataset, a folder that its "
        "save_to_disk wrote or a name on the hub, streamed twice (split train if not given); "
        "JSON lines and Parquet hold a document per row, other files one each",
    )
    parser.add_argument(
        "--max_skipped_fraction",
        type=float,
        default=DEFAULT_MAX_SKIPPED_FRACTION,
        metavar="F",
        help="refuse the input when more than this fraction of its documents cannot be used, empty "
        f"ones aside (default: {DEFAULT_MAX_SKIPPED_FRACTION})",
    )
    _add_row_options(parser)
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="use this SentencePiece model, or this Hugging Face tokenizer.json (with the "
        "tokenizer_config.json beside it, which names BOS and EOS)",
    )
    tokenizer.add_argument(
        "--vocab_size",
        type=int,
        metavar="N",
        help="train a SentencePiece BPE model of this many tokens on a sample of 8 MB "
        f"(default: {DEFAULT_VOCAB_SIZE})",
    )


def _add_row_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text_field",
        default="text",
        metavar="NAME",
        help="JSON field or Parquet column that holds the text (default: text)",
    )
    parser.add_argument(
        "--prompt",
        type=_template,
        default="",
        metavar="FORMAT",
        help="rows are pairs: the prompt, which is read but not learnt, such as "
        "'Utterance: {utterance}\\nParse:' with the names of fields in braces; \\n is a new line",
    )
    parser.add_argument(
        "--response",
        type=_template,
        default="",
        metavar="FORMAT",
        help="rows are pairs: what follows the prompt and is learnt, such as ' {parse}'",
    )


def _template(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to make for the dataset"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=DEFAULT_VALIDATION_FRACTION,
        metavar="F",
        help="expected fraction of documents to hold out, chosen by a hash of their text; at least "
        f"one document is, of a single document its end (default: {DEFAULT_VALIDATION_FRACTION})",
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="end a shard with the document that reaches this many tokens; a shard is held in "
        f"memory until written, 2 or 4 bytes per token (default: {DEFAULT_SHARD_TOKENS})",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that encode; the output is the same for any number "
        "(default: every core this process may use)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset that is already in DIR"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the printed table to this file as JSON"
    )


def format_table(dataset: Dataset) -> str:
    """Return the sizes of a dataset and what was left out, as lines for a reader."""
    lines = [f"{'split':<12}{'documents':>12}{'tokens':>14}{'text MB':>10}{'bytes/token':>13}"]
    for name, split in dataset.splits.items():
        ratio = split.text_bytes / split.tokens
        lines.append(
            f"{name:<12}{split.documents:>12,}{split.tokens:>14,}"
            f"{split.text_bytes / 1e6:>10.2f}{ratio:>13.3f}"
        )
    lines.append(f"vocabulary {dataset.vocab_size}, duplicate documents kept {dataset.duplicates}")
    for reason, count in dataset.skipped.items():
        places = ", ".join(dataset.skipped_at.get(reason, []))
        lines.append(f"skipped {count}: {reason}" + (f" (first: {places})" if places else ""))
    return "\n".join(lines)


def summarize(dataset: Dataset) -> dict[str, object]:
    """Return what the table shows, for `--json`."""
    return {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "vocab_size": dataset.vocab_size,
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "text_bytes": split.text_bytes,
            }
            for name, split in dataset.splits.items()
        },
        "duplicates": dataset.duplicates,
        "skipped": dict(dataset.skipped),
        "skipped_at": dict(dataset.skipped_at),
    }


def run(options: argparse.Namespace) -> None:
    """Prepare the dataset, print its table and write it as JSON where asked."""
    vocab_size = options.vocab_size
    if vocab_size is None and options.tokenizer is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    config = PrepareConfig(
        input=tuple(options.input),
        tokenizer=options.tokenizer,
        vocab_size=vocab_size,
        validation_fraction=options.validation_fraction,
        layout=RowLayout(options.text_field, options.prompt, options.response),
        shard_tokens=options.shard_tokens,
        max_skipped_fraction=options.max_skipped_fraction,
    )
    dataset = prepare(config, options.output, workers=options.workers, overwrite=options.overwrite)
    print(format_table(dataset))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summarize(dataset), indent=2) + "\n")


def main() -> int:
    """Run the command line and return its exit code."""
    options = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
