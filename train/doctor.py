"""What training needs and whether it is here: `python -m train.doctor`, or under torchrun.

Starts where torch, tyro or anything else that is required cannot be imported: each check imports
what it needs, in a process of its own.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # whoever is refused has not installed us
    sys.exit(f"error: python: {sys.version.split()[0]}, give 3.11 or newer")

import importlib.metadata
import json
import os
import platform
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.output_streams import ending_as_a_command, naming_the_file
from train.diagnosis.devices import check_torch, listed_gpus
from train.diagnosis.findings import Check, Finding, Level
from train.diagnosis.machine import check_disk, check_memory, check_python
from train.diagnosis.programs import answer, check_browser, check_compiler, check_slurm
from train.diagnosis.ranks import spawn_ranks, start_rank
from train.diagnosis.surroundings import ROOT, launched_as, shown_variables

_DESCRIPTION = """\
Check all that training needs and print a line for each: ok, optional (only a feature is missing),
warning or problem, what was found -> what to do about it. Exit code 0 if training is possible, 2 if
it is not.

  python -m train.doctor
  torchrun --nproc_per_node=8 -m train.doctor
  srun --ntasks-per-node=1 torchrun --nnodes=2 ... -m train.doctor --json doctor.json"""
IMPOSSIBLE = 2
"""Exit status after a problem, as after any error of a user."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What is checked, and where it is written."""

    output_dir: Path = Path("outputs")
    """The folder of the runs, whose disk is written and read; as of train/main.py."""
    limit_seconds: float = 60.0
    """Longest wait for one check, and of one rank for the others."""
    json: Path | None = None
    """Also write a report here, for a bug report: without host, user and variables that may hold a
    key."""

    def __post_init__(self) -> None:
        if not 1 <= self.limit_seconds <= 3600:
            raise ValueError(f"limit_seconds: {self.limit_seconds:g}, must be 1 to 3600")


def _packages() -> Iterator[Finding]:
    from train.diagnosis.packages import check_packages  # needs a package itself

    yield from check_packages()


def start_checks(options: DoctorOptions) -> list[Check]:
    """Start all that one machine is checked for, side by side."""
    seconds, folder = options.limit_seconds, options.output_dir
    again = "try it by itself: "
    return [
        Check("python", check_python, seconds=seconds),
        Check("packages", _packages, seconds=seconds, remedy=f"{again}python -c 'import torch'"),
        Check("torch", check_torch, seconds=seconds, remedy=f"{again}python -c 'import torch'"),
        Check("memory", _memory, seconds=seconds),
        Check("disk", check_disk, folder, seconds=seconds, remedy=f"{again}ls {folder}"),
        Check("compiler", check_compiler, seconds=seconds),
        Check("slurm", check_slurm, seconds=seconds, remedy=f"{again}scontrol ping"),
        Check("browser", check_browser, seconds=seconds),
    ]


def _memory() -> Iterator[Finding]:
    yield from check_memory(listed_gpus())


def check_machine(options: DoctorOptions) -> Iterator[Finding]:
    """Yield the findings of this machine, in one order, as they come."""
    checks = start_checks(options)
    try:
        for check in checks:
            yield from check.findings()
    finally:
        for check in checks:
            check.stop()


def check_ranks(options: DoctorOptions, before: Sequence[Finding]) -> Iterator[Finding]:
    """Yield what rank 0 finds with the other ranks: those of torchrun, else some of our own."""
    torch = [finding for finding in before if finding.check in ("torch", "gpu")]
    if any(finding.level is Level.PROBLEM for finding in torch) or not torch:
        yield Finding("ranks", Level.WARNING, "not tried, since torch or a GPU does not work")
        return
    if launched := launched_as():
        yield from start_rank(0, launched[2], options.limit_seconds).findings()
        return
    gpus = torch[0].details.get("gpus")
    count = gpus if isinstance(gpus, int) and gpus else 2
    yield from spawn_ranks(count, options.limit_seconds)


def diagnose(options: DoctorOptions) -> int:
    """Print every finding and return the exit status, of rank 0."""
    findings = []
    for finding in check_machine(options):
        print(finding, flush=True)
        findings.append(finding)
    for finding in check_ranks(options, findings):
        print(finding, flush=True)
        findings.append(finding)
    problems = {finding.check for finding in findings if finding.level is Level.PROBLEM}
    possible = not problems
    levels = Counter(finding.level for finding in findings)
    counts = [f"{levels[level]} {level}" for level in Level if levels[level]]
    verdict = "training is possible" if possible else f"not possible: {', '.join(sorted(problems))}"
    print(f"\n{verdict} ({', '.join(counts)})")
    if options.json is not None:
        with naming_the_file("json", options.json):
            options.json.write_text(report(findings, possible))
    return 0 if possible else IMPOSSIBLE


def report(findings: Sequence[Finding], possible: bool) -> str:
    """Return the JSON of a bug report, in which the machine and its user have no names."""
    content = {
        "skipstone": version(),
        "possible": possible,
        "system": platform.platform(),
        "variables": shown_variables(),
        "findings": [asdict(finding) for finding in findings],
    }
    text = json.dumps(content, indent=2)
    home, host = (json.dumps(name)[1:-1] for name in (str(Path.home()), socket.gethostname()))
    user = home.rpartition("/")[2]  # is in other paths too: /scratch/USER
    if user:
        text = re.sub(rf"{re.escape(home)}(?![\w-])", "~", text)
        text = re.sub(rf"/{re.escape(user)}(?![\w-])", "/USER", text)
    if host:
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "HOST", text)
    return text + "\n"


def version() -> str:
    """Return the version that pip has installed and, of a clone, the commit."""
    try:
        number = importlib.metadata.version("skipstone")
    except importlib.metadata.PackageNotFoundError:
        number = "not installed"
    status, text = answer(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return number if status else f"{number}, commit {text.strip()}"


def accompany(options: DoctorOptions, rank: int, local_rank: int, count: int) -> int:
    """Be another rank than the first, which prints what this one finds if they meet."""
    notes = [] if local_rank else [f for f in check_machine(options) if f.level is Level.PROBLEM]
    limit = 2 * options.limit_seconds  # rank 0 is to give up first: it names who is missing
    own = list(start_rank(rank, count, limit, notes).findings())
    problems = [finding for finding in own if finding.level is Level.PROBLEM]
    if not problems:
        return 0
    for finding in [*notes, *problems]:
        print(f"[rank {rank}] {finding}", file=sys.stderr, flush=True)
    time.sleep(limit)  # torchrun ends all when one has failed, also rank 0 before it prints
    return IMPOSSIBLE


def read_words(words: Sequence[str]) -> DoctorOptions:
    """Read the command line, or none of it where tyro, which reads it, is missing: a finding."""
    try:
        from data.command_help import called_as
        from data.command_line import read_options
    except ImportError:
        return DoctorOptions()
    prog = called_as("python -m train.doctor")
    return read_options(DoctorOptions, words, prog=prog, description=_DESCRIPTION)


def main() -> int:
    """Run the command line; a user's error becomes one line and exit code 2."""
    with ending_as_a_command():
        options, launched = read_words(sys.argv[1:]), launched_as()
        if launched and launched[0]:
            return accompany(options, *launched)
        return diagnose(options)


if __name__ == "__main__":
    os._exit(main())  # a check that waits for a dead disk cannot be ended, and is not waited for
