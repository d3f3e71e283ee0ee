"""A folder that appears under its name only when it is whole."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """Give an empty folder beside `output` that becomes it at the end, or goes if that fails.

    Raises:
        ValueError: If something is at `output`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: {output} exists already, name another or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        yield aside
        aside.replace(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
