"""Train every recipe of `train/config/demos.py` on the same tokens and compare the exits.

    PYTHONPATH=. python benchmarks/recipes.py --steps 200 --json benchmarks/recipes.json

Prints a table in Markdown: held-out loss after E layers. Runs lie in outputs/recipes-STEPS; one
that is there already is resumed, or only read if it is done.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from inference.evaluation.report import machine
from train.config.demos import DEMOS
from train.sweep import last_validation


def train(preset: str, steps: int, ranks: int, folder: Path) -> list[float]:
    """Run training to the end and return the held-out loss of every exit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "train/main.py", preset, "--steps", str(steps)]
    command += ["--output_dir", str(folder), "--name", preset]
    subprocess.run(command, check=True)
    last = last_validation(folder / preset)
    return [last[key] for key in sorted(last) if key.startswith("validation/loss_exit_")]


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the losses here")
    args = parser.parse_args()
    folder = Path(f"outputs/recipes-{args.steps}")
    losses = {demo.__name__: train(demo.__name__, args.steps, args.ranks, folder) for demo in DEMOS}
    exits = range(1, 1 + len(losses["demo"]))
    print("| preset |", *(f"E={E} |" for E in exits))
    print("|---|" + "---:|" * len(exits))
    for name, row in losses.items():
        print(f"| `{name}` |", *(f"{loss:.3f} |" for loss in row))
    if args.json is not None:
        content = {"machine": machine(), "steps": args.steps, "ranks": args.ranks}
        args.json.write_text(json.dumps(content | {"held_out_loss": losses}, indent=2) + "\n")


if __name__ == "__main__":
    main()
