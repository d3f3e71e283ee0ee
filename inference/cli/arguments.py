"""The options that several commands share, and the types that options are read as.

A command's options are a dataclass that inherits those it takes, so that its help is one flat list.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.option_values import read_as, read_location, read_path
from data.urls import Location
from inference.engine.sampling import Sampling
from inference.loading.quantized import Bits
from inference.loading.run import Run, load_run
from models.tensor_reader import Weights

_PICTURES = (".jpg", ".pdf", ".png", ".svg")
_LAST_SEED = 2**64 - 1


def output_file(text: str) -> Path:
    """Return the path of a file to write; nothing is written yet, and no folder made.

    Raises:
        ValueError: No file can be written there.
    """
    path = read_path(text)
    try:
        if path.is_dir():
            raise ValueError(f"{text} is a folder, give a file")
        if path.exists():
            writable = os.access(path, os.W_OK)
        else:
            folder = next(parent for parent in path.parents if parent.exists())
            tempfile.TemporaryFile(dir=folder).close()
            writable = True
    except OSError as error:
        raise ValueError(
            f"{text} cannot be written ({error.strerror}), give another path"
        ) from None
    if not writable:
        raise ValueError(f"{text} cannot be written, give another path")
    return path


def picture_file(text: str) -> Path:
    """Return the path of a picture to write.

    Raises:
        ValueError: It is of no known kind, or no file can be written there.
    """
    if read_path(text).suffix.lower() not in _PICTURES:
        raise ValueError(f"{text} is of no known kind, give a name in {', '.join(_PICTURES)}")
    return output_file(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) > _LAST_SEED:
        raise ValueError(f"{text}, give 0 to {_LAST_SEED}")
    return int(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"{text}, give at least 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(_count, text.split(",")))
    except ValueError:
        raise ValueError(f"{text}, give whole numbers, at least 1, as in 1,4") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError(f"{text}, give numbers, as in 0.5,0.9") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _joined(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


Folder = Annotated[Location, read_as("DIR|URL", read_location)]
OutputFile = Annotated[Path, read_as("PATH", output_file)]
PictureFile = Annotated[Path, read_as("PATH", picture_file)]
Seed = Annotated[int, read_as("N", _seed)]
"""0 to 2^64 - 1."""
Count = Annotated[int, read_as("N", _count)]
"""At least 1."""
Names = Annotated[tuple[str, ...], read_as("A,B,...", _names, _joined)]
Counts = Annotated[tuple[int, ...], read_as("N,...", _counts, _joined)]
"""Each at least 1."""
Numbers = Annotated[tuple[float, ...], read_as("X,...", _numbers, _joined)]


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """The run to open."""

    run: Folder
    """Run folder (its newest checkpoint is used) or one checkpoint folder."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and KV cache; float32 on a CPU, bfloat16 on CUDA if not given."""
    weights: Weights = "model"
    """model: those of the last step; ema: their moving average, see optim.ema_decay."""
    quantize: Bits | None = None
    """Hold the layers' matrices in so few bits (torchao), but not those of a draft model."""

    def open_run(self) -> Run:
        """Load the run."""
        return load_run(
            self.run,
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
            weights=self.weights,
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(OpenOptions):
    """The run to open, and where results go."""

    json: OutputFile | None = None
    """Also write the results here."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(RunOptions):
    """The run to decode with."""

    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the layers, and on CUDA run rounds as graphs; takes seconds per shape of a pass."""

    def open_run(self) -> Run:
        """Load the run; compiled, its rounds are kept as graphs on a device that has them."""
        return load_run(
            self.run,
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
            weights=self.weights,
            compiled=self.compile,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn."""

    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    seed: Seed = 0
    """Seed of every random draw."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(RunOptions):
    """What is fitted to a checkpoint: on which text, and where it is kept."""

    data: Folder | None = None
    """Dataset; the one trained on if not given."""
    output: OutputFile | None = None
    """Where to; beside the checkpoint if not given."""
