"""The records of metrics.jsonl, as a later start or the end of a run reads them."""

from collections.abc import Iterable, Iterator

from data.foreign_json import parse


def read_records(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, its numbers) for each record, without damaged lines."""
    for line in lines:
        try:
            record = parse(line, finite=False)
        except ValueError:
            continue
        step = record.pop("step", None) if isinstance(record, dict) else None
        if isinstance(record, dict) and isinstance(step, int):
            yield step, {name: x for name, x in record.items() if isinstance(x, float)}
