"""A grid of runs, one after another: `python -m train.sweep demo --grid optim.lr=1e-3,4e-3 ...`.

Every run has its own name and is resumed, or only read if it is done, when the sweep is given
again. `--print` writes the options of each run on a line instead, which `SWEEP=FILE sbatch
--array=1-N launch/train.slurm PRESET` takes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from train.command_line import parse

_EXAMPLE = """\
example:
  python -m train.sweep demo --grid optim.lr=2e-3,4e-3 --grid early_exit.e_scale=0.2,1.0 \\
      --nproc_per_node 2 -- --steps 200
"""


def read_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `field=value,value,...`, each field once.

    Raises:
        ValueError: a text is something else, or names no value.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        found = [value for value in values.split(",") if value]
        if not equals or not name or not found:
            raise ValueError(f"grid: {text!r} expands to nothing, write field=value,value")
        if name in grid:
            raise ValueError(f"grid: {name} is given twice, give all its values at once")
        grid[name] = found
    if not grid:
        raise ValueError("grid: none is given, write --grid field=value,value")
    return grid


def expand(preset: str, grid: dict[str, list[str]], options: Sequence[str]) -> list[list[str]]:
    """Return the options of every run, those of all first; each has a name made of its own.

    Raises:
        ValueError: a field does not exist.
    """
    runs = []
    for values in product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        words = [word for name, value in own.items() for word in (f"--{name}", value)]
        # The name last: it wins over one among the options, which begins it.
        begun = parse([preset, *options, *words], show=True).config.name
        parts = [f"{name.split('.')[-1]}_{value}" for name, value in own.items()]
        runs.append([*options, *words, "--name", "-".join([begun, *parts])])
    return runs


def last_validation(run_dir: Path) -> dict[str, float]:
    """Return the held-out losses a run wrote last.

    Raises:
        ValueError: it wrote none.
    """
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    found = [line for line in lines if "validation/loss" in line]
    if not found:
        raise ValueError(f"validate: {run_dir} has no held-out loss, let it validate")
    return {name: value for name, value in found[-1].items() if name.startswith("validation/")}


def table(grid: dict[str, list[str]], runs: Sequence[dict[str, float]]) -> str:
    """Return a Markdown table, the best last-layer loss first: fields, loss after every E."""
    rows = [*zip(product(*grid.values()), runs, strict=True)]
    rows.sort(key=lambda row: row[1]["validation/loss"])
    exits = sorted(name for name in runs[0] if "_exit_" in name)
    header = [*grid, *(f"E={E}" for E in range(1, 1 + len(exits)))]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for values, losses in rows:
        lines.append("| " + " | ".join([*values, *(f"{losses[e]:.3f}" for e in exits)]) + " |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep",
        description="Train a preset with every combination of some fields' values and compare the"
        " held-out losses. What follows -- goes to every run.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preset", help="as of train/main.py")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=V,V",
        help="a field and its values; give it again for another field",
    )
    parser.add_argument("--nproc_per_node", default="1", help="processes of a run, as torchrun's")
    parser.add_argument(
        "--print", action="store_true", help="print the options of each run and train nothing"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the losses here")
    return parser


def sweep(arguments: Sequence[str]) -> None:
    """Run the command."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    args, options = build_parser().parse_args(words[:cut]), words[cut + 1 :]
    grid = read_grid(args.grid)
    runs = expand(args.preset, grid, options)
    if args.print:
        print("\n".join(" ".join(run) for run in runs))
        return
    found = {}
    for i, run in enumerate(runs):
        config = parse([args.preset, *run], show=True).config
        print(f"run {i + 1} of {len(runs)}: {config.name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={args.nproc_per_node}", "train/main.py", args.preset, *run]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"run: {config.name} failed, see above; the sweep goes on from there")
        found[config.name] = last_validation(config.run_dir)
    print(table(grid, [*found.values()]))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Enter from the command line; a user's error becomes one line."""
    try:
        sweep(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
