"""The kinds of files of documents, by their names."""

from data.sources.compression import SUFFIXES as COMPRESSIONS

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".html", ".htm", *ROW_SUFFIXES)
"""Of files that may be compressed; Parquet compresses by itself."""


def kind_of(name: str) -> str | None:
    """Return the suffix of a file's name that names its kind, without that of its compression."""
    if name.endswith(".parquet"):
        return ".parquet"
    stem, dot, last = name.rpartition(".")
    plain = stem if dot + last in COMPRESSIONS else name
    return next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)


def check_kind(source: str, name: str) -> str:
    """Return the kind of a file that is an input.

    Raises:
        ValueError: there is none.
    """
    kind = kind_of(name)
    if kind is None:
        kinds = f"{' '.join(SUFFIXES)}, also with {' '.join(COMPRESSIONS)}, or .parquet"
        raise ValueError(f"input {source} is of an unknown kind, give {kinds}")
    return kind
