"""The command line of training: a preset, and any field of it overridden."""

import difflib
from collections.abc import Sequence

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
        ValueError: If there is no such preset.
        SystemExit: After --help, or on a field that does not exist or parse.
    """
    name, *rest = arguments if arguments else (DEFAULT_PRESET,)
    if name.startswith("-"):
        name, rest = DEFAULT_PRESET, list(arguments)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PRESETS)}"
        raise ValueError(f"preset: {name} does not exist, {hint}")
    return tyro.cli(
        TrainConfig,
        prog="train/main.py [PRESET]",
        description=_description(name),
        default=PRESETS[name](),
        args=rest,
        use_underscores=True,
        console_outputs=show,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


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
