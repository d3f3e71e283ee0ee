"""The options that several commands share, and the types that options are read as.

A command's options are a dataclass that inherits those it takes, so that its help is one flat list.
"""

import argparse
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from data.command_line import read_as
from inference.engine.compiled import compile_layers
from inference.engine.cuda_graphs import round_graphs
from inference.engine.sampling import Sampling
from inference.loading.quantized import BITS, Bits
from inference.loading.run import DTYPES, Run, load_run

_PICTURES = (".jpg", ".pdf", ".png", ".svg")
_LAST_SEED = 2**64 - 1


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but for those the help text puts in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that leaves the reporting of errors to `run_command`."""

    def __init__(self, module: str, *, description: str, example: str) -> None:
        """Start with --run, --device, --dtype, --quantize and --json.

        Args:
            module: The command is `python -m` this.
            description: What it does.
            example: Arguments of an example.
        """
        super().__init__(
            prog=f"python -m {module}",
            description=textwrap.fill(description, 79),
            epilog=f"example:\n  python -m {module} {example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--run",
            type=Path,
            required=True,
            metavar="DIR",
            help="run folder (its newest checkpoint is used) or one checkpoint folder",
        )
        self.add_argument(
            "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N"
        )
        self.add_argument(
            "--dtype",
            choices=[*DTYPES],
            help="type of weights and KV cache; float32 on a CPU, bfloat16 on CUDA if not given",
        )
        self.add_argument(
            "--quantize",
            choices=BITS,
            help="hold the layers' matrices in so few bits, by torchao; in --dtype if not given, as"
            " those of another model that drafts always are",
        )
        self.add_argument(
            "--json", type=output_file, metavar="PATH", help="also write the results here"
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ValueError(f"{message}, see --help")


def output_file(text: str) -> Path:
    """Read the path of a file to write; nothing is written yet, and no folder made.

    Raises:
        ArgumentTypeError: no file can be written there.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text or '.'} is a folder, give a file")
        if path.exists():
            writable = os.access(path, os.W_OK)
        else:
            folder = next(parent for parent in path.parents if parent.exists())
            tempfile.TemporaryFile(dir=folder).close()
            writable = True
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written ({error.strerror}), give another path"
        ) from None
    if not writable:
        raise argparse.ArgumentTypeError(f"{text} cannot be written, give another path")
    return path


def picture_file(text: str) -> Path:
    """Read the path of a picture to write.

    Raises:
        ArgumentTypeError: it is of no known kind, or no file can be written there.
    """
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text} is of no known kind, give a name in {', '.join(_PICTURES)}"
        )
    return output_file(text)


def seed_number(text: str) -> int:
    """Read the seed of random draws.

    Raises:
        ArgumentTypeError: torch does not take it.
    """
    if not text.isdecimal() or len(text) > 20 or int(text) > _LAST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r}, give 0 to {_LAST_SEED}")
    return int(text)


def add_sampling_arguments(parser: Parser) -> None:
    """Add --temperature, --top_k, --top_p and --seed."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="divides the logits; 0 is greedy, else at least 1e-6",
    )
    parser.add_argument(
        "--top_k", type=int, help="keep the k most probable tokens; all if not given"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="keep the most probable tokens that sum to this probability; all if not given",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of every random draw")


def sampling_from(args: argparse.Namespace) -> Sampling:
    """Return what `add_sampling_arguments` read."""
    return Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data and --output, for what is fitted to a checkpoint."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="dataset; the one trained on if not given"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="PATH",
        help="where to; beside the checkpoint if not given",
    )


def add_compile_argument(parser: Parser) -> None:
    """Add --compile."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers, and on CUDA run whole rounds as graphs: faster, after seconds for"
        " each shape of a pass",
    )


def decoding_run_from(args: argparse.Namespace) -> Run:
    """Load the run the arguments name, its layers compiled where `add_compile_argument` says so.

    On a device that has graphs, rounds are kept as such then.
    """
    run = run_from(args)
    if not args.compile:
        return run
    compile_layers(run.model)
    return replace(run, graphs=round_graphs(run.model.norm.weight.device))


def run_from(args: argparse.Namespace) -> Run:
    """Load the run the arguments name."""
    return load_run(args.run, device=args.device, dtype=args.dtype, quantize=args.quantize)


def run_command(parser: Parser, command: Callable[[argparse.Namespace], None]) -> None:
    """Run a command; a user's error becomes one line on stderr and exit code 2."""
    try:
        command(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# -- options as dataclasses --------------------------------------------------------------------


def _output_file(text: str) -> Path:
    try:
        return output_file(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def _picture_file(text: str) -> Path:
    try:
        return picture_file(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


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


Folder = Annotated[Path, read_as("DIR", Path)]
OutputFile = Annotated[Path, read_as("PATH", _output_file)]
"""A file to write, which can be written."""
PictureFile = Annotated[Path, read_as("PATH", _picture_file)]
"""An `OutputFile` of a kind that pictures have."""
Seed = Annotated[int, read_as("N", _seed)]
"""What torch takes as a seed."""
Count = Annotated[int, read_as("N", _count)]
"""A whole number, at least 1."""
Names = Annotated[tuple[str, ...], read_as("A,B,...", _names, _joined)]
Counts = Annotated[tuple[int, ...], read_as("N,...", _counts, _joined)]
Numbers = Annotated[tuple[float, ...], read_as("X,...", _numbers, _joined)]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run to open, and where results go."""

    run: Folder
    """Run folder (its newest checkpoint is used) or one checkpoint folder."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and KV cache; float32 on a CPU, bfloat16 on CUDA if not given."""
    quantize: Bits | None = None
    """Hold the layers' matrices in so few bits, by torchao; in --dtype if not given, as those of
    another model that drafts always are."""
    json: OutputFile | None = None
    """Also write the results here."""

    def open_run(self) -> Run:
        """Load the run."""
        return load_run(self.run, device=self.device, dtype=self.dtype, quantize=self.quantize)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(RunOptions):
    """The run to open for decoding."""

    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the layers, and on CUDA run whole rounds as graphs: faster, after seconds for each
    shape of a pass."""

    def open_run(self) -> Run:
        """Load the run; compiled, its rounds are kept as graphs on a device that has them."""
        run = super().open_run()
        if not self.compile:
            return run
        compile_layers(run.model)
        return replace(run, graphs=round_graphs(run.model.norm.weight.device))


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
