"""Training on several ranks of one machine beside one plain process, in turn, and where time goes.

    PYTHONPATH=. python benchmarks/ranks.py --preset dense_demo --json benchmarks/ranks.json

Runs the training command itself, each rank with one thread. One rank holds plain weights: it is
neither sharded nor reduced. The floor is as many of these as there are ranks.
"""

import gzip
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from subprocess import run as run_process
from typing import Any

from benchmarks.results import median_ratio, write_beside
from data.command_line import run_command
from inference.cli.arguments import Count, OutputFile
from inference.loading.machine import machine

ROOT = Path(__file__).parent.parent
PLAIN = "one process"
ARMS = {
    PLAIN: (),
    "auto": (),
    "none": ("--parallel.shard", "none"),
    "blocks": ("--parallel.shard", "blocks"),
    "blocks, ZeRO-2": ("--parallel.shard", "blocks", "--parallel.reshard_after_forward", "False"),
}
"""{arm: its options}; all but the first on several ranks."""
FIRST = 10
"""Steps before the first that counts."""
SPEED = "perf/tokens_per_second"
EVERY = 5
"""Steps of a reading."""
PARTS = {
    "the one sum of gradients": ("average gradients",),
    "other collectives": ("c10d::", "gloo:", "nccl:", "record_param_comms"),
    "attention": ("attention",),
    "optimizer": ("optimizer",),
    "loss and head": ("loss",),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "FSDP2, its waiting too": ("FSDP::",),
}
"""{part: what an event's name contains}; an event takes the part of the innermost that has one."""
KINDS = ("cpu_op", "user_annotation")
REST = "small operations and Python"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure training on several ranks of this machine beside one plain process."""

    preset: str = "dense_demo"
    """Preset of train/main.py."""
    data: str = "outputs/data/embedded-2048"
    """Dataset."""
    ranks: Count = 2
    """Ranks of a run."""
    steps: Count = 30
    """Steps of a run that count."""
    repeats: Count = 5
    """Runs of each arm, in turn."""
    profile: bool = True
    """Profile a few steps of each arm too, and print what the time of rank 0 goes to."""
    json: OutputFile | None = None
    """Also write the numbers to this file, beside those of other presets."""


def run(options: Options, arm: str, folder: Path, *, profile: bool = False) -> list[float]:
    """Train; return tokens per second of every reading that counts."""
    command = [sys.executable]
    if arm != PLAIN:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={options.ranks}"]
    steps = FIRST + options.steps
    command += ["train/main.py", options.preset, "--data.path", options.data]
    command += ["--output_dir", str(folder), "--name", "run", "--steps", str(steps)]
    command += ["--metrics.interval_steps", str(EVERY), "--adam_monitor.interval_steps", "0"]
    command += ["--validate.interval_steps", "0", "--checkpoint.interval_steps", str(10 * steps)]
    command += ["--data.microbatch_size", "0", *ARMS[arm]]
    if profile:
        command += ["--profile.start", str(steps - EVERY), "--profile.steps", str(EVERY)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run_process(
        command, cwd=ROOT, env=environment, stdout=PIPE, stderr=STDOUT, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stdout}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    readings = [json.loads(line) for line in lines]
    return [r[SPEED] for r in readings if SPEED in r and r["step"] > FIRST]


def parts(trace: Path) -> dict[str, float]:
    """Return {part: milliseconds a step} of the main thread of one rank's trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    complete = [e for e in events if e.get("ph") == "X" and e.get("cat") in KINDS]
    steps = [e for e in complete if e["name"].startswith("ProfilerStep")]
    main = [e for e in complete if e["tid"] == steps[0]["tid"] and e["pid"] == steps[0]["pid"]]
    found: Counter[str] = Counter()
    for part, microseconds in _self_times(sorted(main, key=lambda e: (e["ts"], -e["dur"]))):
        found[part] += microseconds / 1000 / len(steps)
    return dict(found.most_common())


def _self_times(events: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield (part, microseconds) of each event without those inside it; given in their order."""
    open_: list[tuple[float, str, list[float]]] = []  # end, part, microseconds of its own
    for event in events:
        while open_ and open_[-1][0] <= event["ts"]:
            _, part, own = open_.pop()
            yield part, own[0]
        around = open_[-1][1] if open_ else REST
        if open_:
            open_[-1][2][0] -= event["dur"]
        named = (p for p, names in PARTS.items() if any(n in event["name"] for n in names))
        open_.append((event["ts"] + event["dur"], next(named, around), [event["dur"]]))
    yield from ((part, own[0]) for _, part, own in open_)


def compare(options: Options) -> None:
    """Measure, print, and write the numbers down."""
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as parent:
        for r in range(options.repeats):
            for i, arm in enumerate(ARMS):
                found = run(options, arm, Path(parent) / f"{r}-{i}")
                speeds[arm].append(statistics.median(found))
                print(f"run {r + 1} of {options.repeats}, {arm}: {speeds[arm][-1]:,.0f} tokens/s")
        times = dict[str, dict[str, float]]()
        for i, arm in enumerate(ARMS if options.profile else ()):
            folder = Path(parent) / f"profile-{i}"
            run(options, arm, folder, profile=True)
            [trace] = (folder / "run" / "profile").glob("*.pt.trace.json.gz")
            times[arm] = parts(trace)
    report(options, speeds, times)


def report(
    options: Options, speeds: dict[str, list[float]], times: dict[str, dict[str, float]]
) -> None:
    """Print a table of medians, and write the numbers as JSON."""
    print(f"{options.preset}, {options.ranks} ranks: {'tokens/s':>12}{'of one process':>16}")
    ratios = {}
    for arm, found in speeds.items():
        ratios[arm] = median_ratio(found, speeds[PLAIN])
        print(f"{arm:25}{statistics.median(found):12,.0f}{ratios[arm]:15.2f}x")
    names = list(dict.fromkeys(part for found in times.values() for part in found))
    if times:
        print(f"\n{'ms a step of rank 0':28}" + "".join(f"{arm:>16}" for arm in times))
    for part in names:
        print(f"{part:28}" + "".join(f"{found.get(part, 0.0):16.1f}" for found in times.values()))
    numbers = {
        "ranks": options.ranks,
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "speed_beside_one_process": ratios,
        "tokens_per_second": speeds,
        "milliseconds_of_rank_0": times,
    }
    write_beside(options.json, options.preset, numbers)


if __name__ == "__main__":
    run_command(Options, compare, prog="benchmarks/ranks.py")
