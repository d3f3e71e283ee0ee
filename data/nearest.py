"""The dataset that a path was meant to be."""

from difflib import get_close_matches
from pathlib import Path

_USUAL = Path("outputs/data")
_FEW = 5


def nearest_dataset(path: Path, description_name: str) -> str:
    """Return a remedy for a path without a dataset: the one that was meant, or how to make one.

    Args:
        path: What was given.
        description_name: The file that makes a folder a dataset.
    """
    there = [
        folder
        for parent in dict.fromkeys((path.parent, path, _USUAL))
        for folder in _folders(parent)
        if (folder / description_name).is_file()
    ]
    by_name = {folder.name: folder for folder in reversed(there)}
    near = get_close_matches(path.name, by_name, n=1)
    make = f"make one with python -m data.prepare --input ... --output {path}"
    if near:
        return f"did you mean {by_name[near[0]]}? Else {make}"
    if there:
        return f"there are {', '.join(map(str, there[:_FEW]))}, or {make}"
    return make


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:  # missing, or not ours
        return []
