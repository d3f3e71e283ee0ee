"""JSON lines, a document each."""

import json
from collections.abc import Iterator

from data.faults import Faults
from data.row_layout import Document, RowLayout
from data.sources.lines import read_lines
from data.sources.source import Source


def read_json_lines(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield one document per line; blank lines are no fault."""
    for number, line in read_lines(source, faults):
        if not line.strip():
            continue
        origin = f"{source.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            faults.add("invalid UTF-8", origin)
            continue
        except (ValueError, RecursionError):
            faults.add("malformed JSON", origin)
            continue
        yield layout.document(row, origin, faults)
