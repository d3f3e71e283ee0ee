"""Reading documents out of files: text, pages, rows of JSON, tables, Parquet, saved datasets.

Yields documents one by one in a fixed order. What cannot be used is skipped, counted by reason
and reported with its file and line. Independent of tokens.
"""

from collections.abc import Callable, Iterable, Iterator

from data.faults import Faults
from data.row_layout import Document, RowLayout
from data.sources.html import read_html
from data.sources.json_lines import read_json_lines
from data.sources.json_rows import read_json
from data.sources.kinds import TEXT_SUFFIXES, kind_of
from data.sources.listing import list_sources
from data.sources.parquet import read_parquet
from data.sources.saved_datasets import read_saved_dataset
from data.sources.source import Source
from data.sources.tables import read_table
from data.sources.text import read_text

Reader = Callable[[Source, RowLayout, Faults], Iterator[Document | None]]
"""Yields the documents of a source; None for one that cannot be used, which is counted."""

_READERS: dict[str, Reader] = {
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
    **dict.fromkeys((".html", ".htm"), read_html),
    **dict.fromkeys((".jsonl", ".ndjson"), read_json_lines),
    ".json": read_json,
    **dict.fromkeys((".csv", ".tsv"), read_table),
    ".parquet": read_parquet,
}


def read_documents(inputs: Iterable[str], faults: Faults, layout: RowLayout) -> Iterator[Document]:
    """Yield the documents of all inputs, in the order given and sorted within each.

    Args:
        inputs: files, folders (recursive, without hidden entries), globs, `embedded`, or a
            Hugging Face dataset, see `data.sources.saved_datasets`.
            .txt .md .rst .py .html hold one document per file, .jsonl one per line, .json .csv
            .tsv .parquet one per row, all but .parquet also compressed (.gz .zst .bz2 .xz). A text
            file above MAX_DOCUMENT_BYTES is cut at line ends into documents of 16 MB.
        faults: counts what is skipped.
        layout: the JSON fields or Parquet columns that hold the text.

    Raises:
        ValueError: an input does not exist, is of an unknown kind, has no such column, or has no
            fields for the prompt and response of `layout`.
    """
    sources = [entry for given in inputs for entry in list_sources(given, faults)]
    return read_sources(sources, faults, layout)


def read_sources(
    sources: Iterable[Source], faults: Faults, layout: RowLayout
) -> Iterator[Document]:
    """Yield the documents of sources, or of parts of them; see `read_documents`."""
    for source in sources:
        documents = _reader(source)(source, layout, faults)
        yield from (document for document in documents if document is not None)


def _reader(source: Source) -> Reader:
    kind = kind_of(source.file_name)
    is_file = source.url or source.path.is_file()
    return _READERS[kind] if kind and is_file else read_saved_dataset
