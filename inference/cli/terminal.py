"""Tables, progress and JSON of the commands."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data.output_streams import naming_the_file

T = TypeVar("T")

_LINE_INTERVAL_SECONDS = 10.0


def write_json(path: Path | None, content: object, field: str = "json") -> None:
    """Write `content` to `path`, where the option `field` gives one."""
    if path is not None:
        with naming_the_file(field, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its columns aligned, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    )


def report_line(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def with_progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items, with a bar on a terminal, in a log with a line now and then, on stderr."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, file=sys.stderr, leave=False)
        return
    next_line = time.monotonic() + _LINE_INTERVAL_SECONDS
    for done, item in enumerate(items):
        if time.monotonic() >= next_line:
            print(f"{label}: {done} of {len(items)}", file=sys.stderr, flush=True)
            next_line = time.monotonic() + _LINE_INTERVAL_SECONDS
        yield item
