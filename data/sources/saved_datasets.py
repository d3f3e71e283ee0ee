"""Rows of a Hugging Face dataset, streamed: a folder `save_to_disk` wrote, or a name on the hub.

An input is written hf:NAME[:SPLIT[:CONFIG]], such as hf:books or hf:wikitext:train:wikitext-2-v1,
or as the path of a saved folder.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.faults import Faults
from data.row_layout import Document, RowLayout
from data.sources.source import Source
from data.urls import is_url

PREFIX = "hf:"
_MARKERS = {"dataset_dict.json", "state.json", "dataset_info.json"}
DEFAULT_SPLIT = "train"

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""NAME or OWNER/NAME; anything else is a path."""


def read_saved_dataset(
    source: Source, layout: RowLayout, faults: Faults
) -> Iterator[Document | None]:
    """Yield one document per row, see `_rows`."""
    for number, row in _rows(source.name, layout):
        yield layout.document(row, f"{source.name}:{number}", faults)


def _rows(source: str, layout: RowLayout) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row, from 1, and some columns of it, in the dataset's order.

    A folder is read from the disk; of a name on the hub no more is fetched than is read, again on
    every pass.

    Args:
        source: a folder, or hf:NAME[:SPLIT[:CONFIG]]; the split is "train" if not given. Folders
            saved with one split have no other, "train" if it has no name, and no CONFIG.
        layout: names the columns to read.

    Raises:
        ValueError: there is no such dataset, split, configuration or column, or it cannot be
            read to its end.
    """
    rows = open_dataset_rows(source)
    columns = rows.column_names
    if columns is not None:
        check_columns(source, columns, _texts(rows.features, columns), layout)
        rows = rows.select_columns(list(layout.fields))
    number = 0
    try:
        for number, row in enumerate(rows):
            yield number + 1, row
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"input {source} cannot be read after row {number + 1} ({error}), try again"
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote this folder."""
    return has_markers(name for name in _MARKERS if (folder / name).is_file())


def has_markers(names: Iterable[str]) -> bool:
    """Whether `save_to_disk` wrote a folder with files of these names."""
    found = _MARKERS.intersection(names)
    return "dataset_dict.json" in found or found >= {"state.json", "dataset_info.json"}


def check_columns(
    source: str, columns: Sequence[str], texts: Sequence[str], layout: RowLayout
) -> None:
    """Raise a ValueError if a source lacks a column of the layout; `texts` are those of text."""
    for field in layout.fields:
        if field in columns:
            continue
        if hint := layout.chats_hint(columns):
            raise ValueError(f"{layout.naming(field)} is no column of {source}{hint}")
        texts = columns if layout.messages else texts
        if not texts:
            raise ValueError(
                f"{layout.naming(field)} is no column of {source}, which has no column of text"
                f" ({', '.join(columns)}), name its token ids as tokens_field"
            )
        raise ValueError(
            f"{layout.naming(field)} is no column of {source}, give one of: {', '.join(texts)}"
        )


def _texts(features: Any, columns: Sequence[str]) -> list[str]:
    """Return the columns of text; all where the dataset does not name their types."""
    if features is None:
        return list(columns)
    kinds = {name: getattr(features[name], "dtype", None) for name in columns}
    return [name for name, kind in kinds.items() if kind in ("string", "large_string")]


def open_dataset_rows(source: str) -> Any:
    """Open a dataset, which yields its rows.

    Raises:
        ValueError: there is no such dataset, split or configuration.
    """
    name, split, config = source, "", ""  # the path of a folder
    if source.startswith(PREFIX) and not is_url(source):
        name, split, config = (source.removeprefix(PREFIX).split(":", 2) + ["", ""])[:3]
    if not name:
        raise ValueError(f"input {source} names no dataset, give hf:NAME[:SPLIT[:CONFIG]]")
    try:
        import datasets  # Imported here: a slow import that only this kind of input needs.

        datasets.disable_progress_bars()
        if not is_url(name) and not Path(name).is_dir():
            if not _HUB_NAME.fullmatch(name):
                raise ValueError("there is no such folder")
            with _without_warnings("huggingface_hub"):  # Of every retry; the error repeats them.
                return datasets.load_dataset(
                    name, config or None, split=split or DEFAULT_SPLIT, streaming=True
                )
        found = datasets.load_from_disk(name)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"input {source} cannot be opened ({error}), give a folder that save_to_disk wrote or "
            "a name on the hub"
        ) from error
    if config:
        raise ValueError(f"input {source} is a folder, which has no CONFIG, leave it out")
    if isinstance(found, datasets.DatasetDict):
        if (split or DEFAULT_SPLIT) not in found:
            raise ValueError(
                f"input {source} has no split {split or DEFAULT_SPLIT}, give"
                f" {PREFIX}{name}:SPLIT, one of: {', '.join(found)}"
            )
        return found[split or DEFAULT_SPLIT]
    own = str(found.split or DEFAULT_SPLIT)
    if split and split != own:
        raise ValueError(f"input {source} is saved as one split, {own}, give that or none")
    return found


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Silence a logger below the level of errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
