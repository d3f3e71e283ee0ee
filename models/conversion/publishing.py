"""A folder that appears under its name only when it is whole."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output`, renamed to it at the end; on an error, removed.

    Raises:
        ValueError: If `output` exists and is not an empty folder.
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
