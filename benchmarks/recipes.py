"""Train every recipe of `train/config/demos.py` on the same tokens and compare the exits.

    PYTHONPATH=. python benchmarks/recipes.py --steps 200 --json benchmarks/recipes.json

Prints a table in Markdown: held-out loss after E layers. Runs lie in outputs/recipes-STEPS; one
that is there already is resumed, or only read if it is done.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.command_line import run_command
from inference.cli.arguments import Count, OutputFile
from inference.loading.machine import machine
from train.config.demos import DEMOS
from train.sweep import last_validation


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train every recipe on the same tokens and compare the exits."""

    steps: Count = 200
    """Optimizer steps of each."""
    ranks: Count = 2
    """Processes of each."""
    json: OutputFile | None = None
    """Also write the losses here."""


def train(preset: str, steps: int, ranks: int, folder: Path) -> list[float]:
    """Run training to the end and return the held-out loss of every exit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "train/main.py", preset, "--steps", str(steps)]
    command += ["--output_dir", str(folder), "--name", preset]
    subprocess.run(command, check=True)
    last = last_validation(folder / preset)
    return [last[key] for key in sorted(last) if key.startswith("validation/loss_exit_")]


def compare(options: Options) -> None:
    """Train and print."""
    folder = Path(f"outputs/recipes-{options.steps}")
    losses = {
        demo.__name__: train(demo.__name__, options.steps, options.ranks, folder) for demo in DEMOS
    }
    exits = range(1, 1 + len(losses["demo"]))
    print("| preset |", *(f"E={E} |" for E in exits))
    print("|---|" + "---:|" * len(exits))
    for name, row in losses.items():
        print(f"| `{name}` |", *(f"{loss:.3f} |" for loss in row))
    if options.json is not None:
        content = {"machine": machine(), "steps": options.steps, "ranks": options.ranks}
        options.json.write_text(json.dumps(content | {"held_out_loss": losses}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(Options, compare, prog="python benchmarks/recipes.py")
