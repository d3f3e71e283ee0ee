"""The command line of training: a preset or a file, any field of it overridden, and what to do."""

import dataclasses
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.command_help import called_as
from data.command_line import read_options
from data.suggestion import suggest
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.config.config import TrainConfig
from train.config.config_file import given_fields, read_config
from train.config.presets import PRESETS
from train.config.synonyms import SYNONYMS

DEFAULT_PRESET = "demo"


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The machine that --dry_run plans for."""

    ranks: int = 8
    """Number of GPUs that --dry_run plans for."""
    memory_gib: float | None = None
    """Memory of each of those GPUs, in GiB; None: that of `gpu`."""
    gpu: Literal["A100", "H100", "H200", "B200"] = "H100"
    """Which GPUs: their peak in bfloat16 and their NVLink, of which --dry_run expects the speed."""
    mfu: float = 0.4
    """Share of that peak which computing is expected to reach; 0.3 to 0.5 is usual."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    network_gb: float = 50.0
    """GB/s in each direction of the network adapter of each GPU; 50 is one of 400 Gb/s."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        found = [
            f"{name}: {value}, must be at least 1"
            for name, value in (("ranks", self.ranks), ("gpus_per_node", self.gpus_per_node))
            if value < 1
        ]
        found += [
            f"{name}: {value}, must be positive and finite"
            for name, value in (("memory_gib", self.memory_gib), ("network_gb", self.network_gb))
            if value is not None and not 0 < value < math.inf
        ]
        if not 0 < self.mfu <= 1:
            found.append(f"mfu: {self.mfu}, must lie in (0, 1]")
        return found


_DRY_RUN_FIELDS = tuple(field.name for field in dataclasses.fields(DryRun))


@dataclass(frozen=True)
class Command:
    """A command line that has been read."""

    config: TrainConfig
    """The run."""
    dry_run: DryRun | None
    """Plan the run for this machine and end; None trains."""
    check: bool = False
    """Check the run and end."""
    given: frozenset[str] = frozenset()
    """Full names of the fields that the user has given, as options or in a file."""
    preset: TrainConfig | None = None
    """The preset as it is; None where a file alone is the run."""


@dataclass(frozen=True, kw_only=True)
class _CommandLine:
    config: tyro.conf.FlagConversionOff[Annotated[TrainConfig, tyro.conf.arg(name="")]]
    file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Fields of the run, from a run's config.json or YAML or TOML of the same fields: over those of
    PRESET, under the options. Without PRESET the file alone is the run."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the plan of the run (sizes, memory per GPU, FLOPs, steps) and end; refuse what cannot
    work. Needs one process, no GPU and no data."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the options, the dataset if it is there, and that the run folder can be written and is
    held by no other job, and end; for job scripts. WORLD_SIZE in the environment is the number of
    ranks."""
    tokens: float | None = None
    """Train on so many tokens in place of `steps`, rounded up to whole steps."""
    machine: Annotated[DryRun, tyro.conf.arg(name="")] = field(default_factory=DryRun)


def parse(arguments: Sequence[str], *, show: bool) -> Command:
    """Read `[PRESET] [--config FILE] [--section.field VALUE ...] [--dry_run ...]`.

    Args:
        arguments: The command line without the program's name.
        show: Whether this process may print help.

    Raises:
        ValueError: If there is no such preset or field, a value does not parse, an option of
            --dry_run stands alone, or --tokens stands beside --steps; one line for each problem.
        SystemExit: After --help.
    """
    name, *rest = arguments if arguments else ("",)
    if name.startswith("-"):
        name, rest = "", list(arguments)
    if name and name not in PRESETS:
        raise ValueError(f"preset: {name} does not exist, {suggest(name, [*PRESETS])}")
    line = _read(name, rest, show=show)
    given = {word.split("=")[0][2:].replace("-", "_") for word in rest if word.startswith("--")}
    if not line.dry_run and (alone := [name for name in _DRY_RUN_FIELDS if name in given]):
        raise ValueError(f"{alone[0]}: belongs to a plan and not to training, add --dry_run")
    config = line.config
    if line.tokens is not None:
        config = dataclasses.replace(config, steps=_steps(line.tokens, config, given))
        given.add("steps")
    config = dataclasses.replace(config, checkpoint=_one_start(config.checkpoint, given))
    if line.file is not None:
        given |= given_fields(line.file)
    has_preset = bool(name) or line.file is None
    return Command(
        config,
        line.machine if line.dry_run else None,
        check=line.check,
        given=frozenset(given),
        preset=PRESETS[name or DEFAULT_PRESET]() if has_preset else None,
    )


def _read(preset: str, words: Sequence[str], *, show: bool) -> _CommandLine:
    """Return the options among `words` over the file they name over a preset, the demo if ""."""
    file = _config_file(words)
    if file is None:
        base, origin = PRESETS[preset or DEFAULT_PRESET](), f"the preset {preset or DEFAULT_PRESET}"
    else:
        base, origin = read_config(file, PRESETS[preset]() if preset else None), str(file)
    return read_options(
        _CommandLine,
        words,
        prog=f"{called_as('train/main.py')} [PRESET]",
        description=_description(origin),
        default=_CommandLine(config=base),
        synonyms=SYNONYMS | dict.fromkeys(PRESETS, "name the preset first"),
        show=show or not {"-h", "--help"} & {*words},
    )


def _config_file(words: Sequence[str]) -> Path | None:
    """Return the file that --config names, which decides the defaults of all other options."""
    files = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    files += [after for word, after in pairwise(words) if word == "--config"]
    if len(files) > 1:
        raise ValueError(f"config: {', '.join(files)}, give one file")
    return Path(files[0]) if files else None


def _steps(tokens: float, config: TrainConfig, given: Container[str]) -> int:
    """Return the steps that read `tokens`."""
    if "steps" in given:
        raise ValueError(f"tokens: {tokens:g}, but steps are given too, leave one of them out")
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens: {tokens:g}, must be positive")
    # Where there is no token in a step, the configuration is refused for that.
    return config.data.batch.steps_for(math.ceil(tokens / max(config.data.seq_len, 1)))


def _one_start(config: CheckpointConfig, given: Container[str]) -> CheckpointConfig:
    """Return what a run starts from, if that is one thing; the preset's own gives way."""
    if not (config.init_from and config.resume_from and "checkpoint.init_from" in given):
        return config
    if "checkpoint.resume_from" in given:
        raise ValueError(
            f"checkpoint.init_from: {config.init_from}, but checkpoint.resume_from is given too, "
            "leave one of them out: the first starts from weights alone, the second goes on"
        )
    return dataclasses.replace(config, resume_from="", step=0)


def _description(origin: str) -> str:
    lines = [
        "Pretrain a Llama that can stop early: LayerSkip's layer dropout and early-exit loss under",
        "FSDP2. Run under torchrun, one process per GPU; the same command again resumes.",
        "",
        "Presets:",
    ]
    for name, preset in PRESETS.items():
        summary = (preset.__doc__ or "").split("\n")[0]
        lines.append(f"  {name:22s} {summary}")
    lines += ["", f"The defaults shown below are those of {origin}."]
    return "\n".join(lines)
