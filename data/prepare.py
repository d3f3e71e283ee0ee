"""The command that turns text into a dataset: `python -m data.prepare --help`."""

import json
import logging
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from data.command_line import run_command
from data.dataset import Dataset
from data.output_streams import naming_the_file
from data.preparation import Stage, prepare_stage
from data.prepare_config import PrepareConfig
from data.url_dataset import prepare_at
from data.urls import Location, Url

DEFAULT_VOCAB_SIZE = 4096

_DESCRIPTION = """\
Turn text into a folder of token shards with a held-out validation split. Where neither a tokenizer
nor a vocab_size is given, a tokenizer of 4096 tokens is trained.

examples:
  python -m data.prepare --input embedded --output datasets/embedded --vocab_size 2048
  python -m data.prepare --input 'books/*.txt' more.jsonl.zst --output datasets/books
  python -m data.prepare --input news.parquet --text_field body --output datasets/news \\
      --tokenizer datasets/books/tokenizer.model
  python -m data.prepare --input pairs.jsonl --prompt 'Q: {question}\\nA:' --response ' {answer}' \\
      --output datasets/pairs --tokenizer datasets/books/tokenizer.model
  python -m data.prepare --input chats.jsonl --messages messages --output datasets/chats \\
      --tokenizer Llama-3.2-1B-Instruct/tokenizer.json
  python -m data.prepare --input hf:saved_folder:train --output datasets/more \\
      --tokenizer Llama-3.2-1B/tokenizer.json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
    output: Location
    """Folder to make for the dataset, or its URL, such as s3://bucket/corpus."""
    workers: int | None = None
    """Processes that read and encode; the output is the same for any number. None: every core that
    this process may use."""
    stage: Stage | None = None
    """Do one part, on a cluster: survey, then encode as several tasks, at once or in any order, on
    machines that share the folder of `output`, then merge. Each may be repeated, and does what is
    missing alone. See launch/prepare.slurm. None: all of it, here."""
    task: int = 0
    """Which one of `tasks` this is, from 0, in the stage encode."""
    tasks: int = 1
    """Number of tasks of the stage encode."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a dataset that is already in `output`."""
    json: Path | None = None
    """Write the printed table to this file as JSON."""


def format_table(dataset: Dataset) -> str:
    """Return a table of the sizes of a dataset, and a line for each kind of skipped document."""
    lines = [f"{'split':<12}{'documents':>12}{'tokens':>14}{'text MB':>10}{'bytes/token':>13}"]
    for name, split in dataset.splits.items():
        ratio = split.text_bytes / max(split.tokens, 1)
        lines.append(
            f"{name:<12}{split.documents:>12,}{split.tokens:>14,}"
            f"{split.text_bytes / 1e6:>10.2f}{ratio:>13.3f}"
        )
    kept = "dropped" if dataset.dropped_duplicates else "kept"
    lines.append(
        f"vocabulary {dataset.vocab_size}, duplicate documents {kept} {dataset.duplicates}, "
        f"held out {dataset.held_out_share:.2%} of the tokens"
    )
    for reason, count in dataset.skipped.items():
        origins = ", ".join(dataset.skipped_at.get(reason, []))
        lines.append(f"skipped {count}: {reason}" + (f" (first: {origins})" if origins else ""))
    return "\n".join(lines)


def summarize(dataset: Dataset, output: Location) -> dict[str, object]:
    """Return the content of the table, for `--json`."""
    return {
        "path": str(output),
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
        "held_out_share": dataset.held_out_share,
        "duplicates": dataset.duplicates,
        "dropped_duplicates": dataset.dropped_duplicates,
        "skipped": dict(dataset.skipped),
        "skipped_at": dict(dataset.skipped_at),
    }


def run(options: Options) -> None:
    """Prepare the dataset, print its table and write it to `json` where that is given."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config, layout = options.config, options.config.layout
    if config.vocab_size is None and config.tokenizer is None:
        config = replace(config, vocab_size=DEFAULT_VOCAB_SIZE)
    layout = replace(layout, prompt=_unescaped(layout.prompt), response=_unescaped(layout.response))
    dataset = _prepared(replace(config, layout=layout), options)
    if dataset is None:
        return  # A stage that is not the last.
    print(format_table(dataset))
    print(f"next: {next_command(dataset, options.output)}")
    if options.json is not None:
        with naming_the_file("json", options.json):
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(summarize(dataset, options.output), indent=2) + "\n")


def _prepared(config: PrepareConfig, options: Options) -> Dataset | None:
    output, workers, overwrite = options.output, options.workers, options.overwrite
    if options.stage is None:
        return prepare_at(config, output, workers=workers, overwrite=overwrite)
    if isinstance(output, Url):
        raise ValueError(f"stage {options.stage}: {output} is a URL, give a folder all tasks see")
    return prepare_stage(
        config,
        output,
        options.stage,
        task=options.task,
        tasks=options.tasks,
        workers=workers,
        overwrite=overwrite,
    )


def next_command(dataset: Dataset, output: Location) -> str:
    """Return a command that trains on the dataset."""
    whole = " --data.packing documents --data.mask_documents True" if dataset.holds_pairs else ""
    return (
        "torchrun --nproc_per_node=2 train/main.py demo --name my-run"
        f" --data.path {shlex.quote(str(output))}{whole}"
    )


def _unescaped(template: str) -> str:
    return template.replace("\\n", "\n").replace("\\t", "\t")


def main() -> None:
    run_command(Options, run, prog="python -m data.prepare", description=_DESCRIPTION)


if __name__ == "__main__":
    main()
