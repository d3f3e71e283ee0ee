"""The samples of text in a run folder: samples/step-00000500.md, a file for each measurement."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from train.run_folder.writing import attempt, replace_file


def write_samples(folder: Path, step: int, samples: Mapping[str, str]) -> None:
    """Write the Markdown of the samples after `step` steps, by name; nothing if there is none."""
    if samples:
        parts = (f"## {name.replace('_', ' ')}\n\n{text}\n" for name, text in samples.items())
        text = f"# Samples after {step} steps\n\n" + "\n".join(parts)
        path = folder / f"step-{step:08d}.md"
        attempt(path, partial(replace_file, path, text.encode(errors="replace")))
