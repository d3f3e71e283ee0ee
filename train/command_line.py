"""The command line of training: a preset, and any field of it overridden."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

import tyro

from train.config import TrainConfig
from train.presets import PRESETS

DEFAULT_PRESET = "demo"


def parse(arguments: Sequence[str], *, show: bool) -> TrainConfig:
    """Return the configuration that `[PRESET] [--section.field VALUE ...]` asks for.

    Args:
        arguments: The command line without the program's name.
        show: Whether this process may print help and tyro's own errors.

    Raises:
        ValueError: If there is no such preset or field.
        SystemExit: After --help, or on a value that does not parse; tyro has said why.
    """
    name, *rest = arguments if arguments else (DEFAULT_PRESET,)
    if name.startswith("-"):
        name, rest = DEFAULT_PRESET, list(arguments)
    if name not in PRESETS:
        raise ValueError(f"preset: {name} does not exist, {_suggest(name, [*PRESETS])}")
    config, unknown = tyro.cli(
        TrainConfig,
        prog="train/main.py [PRESET]",
        description=_description(name),
        default=PRESETS[name](),
        args=rest,
        use_underscores=True,
        console_outputs=show,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    if unknown and unknown[0] in PRESETS:
        raise ValueError(f"preset: {unknown[0]} comes after an option, name the preset first")
    if unknown:
        options = [f"--{field}" for field in _field_names(config.as_dict())]
        hint = _suggest(unknown[0].split("=")[0], options)
        raise ValueError(f"option: {unknown[0]} does not exist, {hint}")
    return config


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose one of {', '.join(known)}" if len(known) < 20 else "see --help"


def _field_names(fields: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _field_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _description(chosen: str) -> str:
    lines = [
        "Pretrain a Llama that can stop early: LayerSkip's layer dropout and early-exit loss under",
        "FSDP2. Run under torchrun, one process per GPU; the same command again resumes.",
        "",
        "Presets:",
    ]
    for name, preset in PRESETS.items():
        summary = (preset.__doc__ or "").split("\n")[0]
        lines.append(f"  {name:22s} {summary}")
    lines += ["", f"The defaults shown below are those of the preset {chosen}."]
    return "\n".join(lines)
