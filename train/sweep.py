"""A grid of runs, one after another: `python -m train.sweep demo --grid optim.lr=1e-3,4e-3 ...`.

Every run has its own name and is resumed, or only read if it is done, when the sweep is given
again. `--sbatch` has a cluster train all of them as one array job instead, each task one line of
the options that `--print` prints; `--table` compares what is finished.
"""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import tyro

from data.command_help import called_as
from data.command_line import read_known_options
from data.output_streams import ending_as_a_command
from train.config.command_line import parse
from train.config.config import TrainConfig

_DESCRIPTION = """\
Train a preset with every combination of some fields' values and compare the held-out losses. What
follows -- goes to every run; --sbatch passes all other options (--nodes=4) to sbatch.

  python -m train.sweep demo --grid optim.lr=2e-3,4e-3 --grid early_exit.e_scale=0.2,1.0 \\
      --nproc_per_node 2 -- --steps 200
  python -m train.sweep scratch_1_5b --grid optim.lr=4e-4,8e-4 --sbatch --nodes=4
  python -m train.sweep scratch_1_5b --grid optim.lr=4e-4,8e-4 --table"""
_SCRIPT = Path(__file__).with_name("main.py")
_NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What comes before `--`."""

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]]
    """As of train/main.py."""
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field and its values, FIELD=V,V; once for each field. A value of several numbers joins them
    by +: early_exit.exits=2+4,2."""
    nproc_per_node: str = ""
    """Processes of a run, as torchrun's; empty: 1."""
    print: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the options of each run and train nothing."""
    sbatch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Submit an array job, a task for each run."""
    table: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compare the runs that are finished and train nothing."""
    json: Path | None = None
    """Also write the losses here."""

    def check(self, others: Sequence[str]) -> None:
        """Raise a ValueError where options do not go together.

        Args:
            others: The words that are none of the sweep's.
        """
        instead = [name for name in ("print", "sbatch", "table") if getattr(self, name)]
        if len(instead) > 1:
            raise ValueError(f"{instead[1]}: does not go with --{instead[0]}, choose one")
        if others and not self.sbatch:
            raise ValueError(f"options: {' '.join(others)} are none of the sweep's, see --help")
        if self.nproc_per_node and instead:
            raise ValueError(
                f"nproc_per_node: {self.nproc_per_node}, nothing is run here, leave it out"
            )
        if self.json and (self.print or self.sbatch):
            raise ValueError(f"json: {self.json}, there are no losses yet, use it with --table")


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
    """Return the options of each run, those of all first; a name for each, a group for all.

    Raises:
        ValueError: a field does not exist, or two runs would have the same name.
    """
    runs: dict[str, list[str]] = {}
    fields = "-".join(field.split(".")[-1] for field in grid)
    for values in product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        words = [word for field, text in own.items() for word in (f"--{field}", *words_of(text))]
        # The name last: it wins over one among the options, which begins it.
        config = parse([preset, *options, *words], show=True).config
        parts = [f"{field.split('.')[-1]}_{text}" for field, text in own.items()]
        name = re.sub("[^A-Za-z0-9._-]", "_", "-".join([config.name, *parts]))
        if name in runs:
            raise ValueError(f"grid: two runs have the name {name}, give every value once")
        group = [] if config.metrics.group else ["--metrics.group", f"{config.name}-{fields}"]
        runs[name] = [*options, *words, *group, "--name", name]
    return list(runs.values())


def words_of(value: str) -> list[str]:
    """Return the words of one value: numbers joined by +, as in 2+4, are several; 1e+3 is one."""
    joined = re.fullmatch(rf"{_NUMBER}(\+{_NUMBER})+", value)
    return re.findall(_NUMBER, value) if joined else [value]


def check(configs: Sequence[TrainConfig], ranks: str | None) -> None:
    """Check every run before any is started.

    Args:
        configs: The runs.
        ranks: As torchrun's --nproc_per_node. Where it is None or no number, the fewest ranks that
            a run can have are assumed.

    Raises:
        ValueError: one cannot be trained.
    """
    given = int(ranks) if ranks and re.fullmatch(r"[1-9]\d*", ranks) else None
    for config in configs:
        if found := config.problems(given or max(config.parallel.dp_replicate, 1)):
            raise ValueError(f"run: {config.name} cannot be trained: {'; '.join(found)}")


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


def table(grid: dict[str, list[str]], runs: Sequence[dict[str, float] | None]) -> str:
    """Return a Markdown table, the best last-layer loss first: fields, loss after every E.

    Args:
        grid: The fields and their values.
        runs: The held-out losses of every combination, None of those to be left out; not of all.
    """
    rows = [
        (values, losses)
        for values, losses in zip(product(*grid.values()), runs, strict=True)
        if losses is not None
    ]
    rows.sort(key=lambda row: row[1]["validation/loss"])
    exits = sorted(name for name in rows[0][1] if "_exit_" in name)
    header = [*grid, *(f"E={E}" for E in range(1, 1 + len(exits)))]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for values, losses in rows:
        lines.append("| " + " | ".join([*values, *(f"{losses[e]:.3f}" for e in exits)]) + " |")
    return "\n".join(lines)


def sweep(arguments: Sequence[str]) -> None:
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    options, others = read_known_options(
        SweepOptions, words[:cut], prog=called_as("python -m train.sweep"), description=_DESCRIPTION
    )
    options.check(others)
    grid, preset = read_grid(options.grid), options.preset
    runs = expand(preset, grid, words[cut + 1 :])
    configs = [parse([preset, *run], show=True).config for run in runs]
    ranks = options.nproc_per_node or "1"
    if not options.table:
        check(configs, None if options.print or options.sbatch else ranks)
    if options.print:
        print(options_of_each(runs), end="")
    elif options.sbatch:
        submit(preset, runs, others)
    else:
        for i, (config, run) in enumerate(zip(configs, runs, strict=True)):
            if not options.table:
                print(f"run {i + 1} of {len(runs)}: {config.name}", file=sys.stderr, flush=True)
                train(preset, run, config.name, ranks)
        report(grid, configs, options.json)


def train(preset: str, run: Sequence[str], name: str, ranks: str) -> None:
    """Train one run, or go on with it.

    Raises:
        ValueError: It fails.
        KeyboardInterrupt: Ctrl-C has stopped it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(_SCRIPT), preset, *run]
    interrupts: list[int] = []  # a Ctrl-C reaches torchrun too, which ends once the run is saved
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        status = subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"run: {name} failed, see above; the sweep goes on from there")


def options_of_each(runs: Sequence[Sequence[str]]) -> str:
    """Return a line for each run, as launch/train.slurm reads it: words between spaces.

    Raises:
        ValueError: a word is empty or holds a space.
    """
    for word in (word for run in runs for word in run):
        if word.split() != [word]:
            raise ValueError(
                f"options: {word!r} is not one word on a line of a job array, choose a value "
                "without spaces"
            )
    return "".join(" ".join(run) + "\n" for run in runs)


def submit(preset: str, runs: Sequence[Sequence[str]], options: Sequence[str]) -> None:
    """Submit the runs as one array job.

    Args:
        preset: What launch/train.slurm begins with.
        runs: The options of each.
        options: More of sbatch's own.

    Raises:
        ValueError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch: there is none here, submit where SLURM is, or --print the lines")
    lines = options_of_each(runs)
    # Named by what is in it: a task that is requeued finds what it was submitted with.
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    path = Path("outputs", "slurm", f"sweep-{digest}.txt").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines)
    command = ["env", f"SWEEP={path}", "sbatch", f"--array=1-{len(runs)}", *options]
    if subprocess.run([*command, "launch/train.slurm", preset], check=False).returncode:
        raise ValueError(f"sbatch: refused {len(runs)} tasks of {path}, see above")


def report(
    grid: dict[str, list[str]], configs: Sequence[TrainConfig], json_path: Path | None
) -> None:
    """Print the table of the runs that are finished, and name the others.

    Raises:
        ValueError: none is.
    """
    found = []
    for config in configs:
        state = state_of(config.run_dir)
        found.append(last_validation(config.run_dir) if state == "finished" else None)
        if state != "finished":
            print(f"left out: {config.name} is {state}", file=sys.stderr)
    if not any(found):
        raise ValueError(f"run: none of {len(configs)} is finished, train them first")
    print(table(grid, found))
    if json_path is not None:
        losses = {c.name: run for c, run in zip(configs, found, strict=True) if run is not None}
        json_path.write_text(json.dumps(losses, indent=2) + "\n")


def state_of(run_dir: Path) -> str:
    path = run_dir / "status.json"
    return str(json.loads(path.read_text())["state"]) if path.is_file() else "not begun"


def main() -> None:
    """Run the command line; a user's error becomes one line and exit code 2."""
    with ending_as_a_command():
        sweep(sys.argv[1:])


if __name__ == "__main__":
    main()
