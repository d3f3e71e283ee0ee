"""Programs around the training: the compiler, SLURM, the browser of the tests."""

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.diagnosis.findings import Finding, Level
from train.diagnosis.surroundings import in_clone, is_set, launched_as, variable

ANSWERED_WITHIN_SECONDS = 15.0
_PROGRAM = "#include <Python.h>\n#include <omp.h>\nint main() { return omp_get_max_threads(); }\n"


def answer(command: Sequence[str], text: str = "") -> tuple[int, str]:
    """Run a program; return status and output, 127 where there is none, 124 after too long."""
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWERED_WITHIN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {ANSWERED_WITHIN_SECONDS:g} s"
    except OSError as error:
        return 127, str(error.strerror)
    return done.returncode, done.stdout + done.stderr


def check_compiler() -> Iterator[Finding]:
    """Compile a program as torch's compiler would on a CPU, with OpenMP and Python's headers."""
    compiler = variable("CXX") or "g++"
    include = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.o")
        command = [compiler, "-x", "c++", "-fopenmp", f"-I{include}", "-c", "-", "-o", out]
        status, text = answer(command, _PROGRAM)
    if status == 0:
        _, version = answer([compiler, "-dumpfullversion"])
        number = version.split()[0] if version.split() else ""
        yield Finding(
            "compiler", Level.OK, f"{compiler} {number}, for --compile".replace(" ,", ",")
        )
        return
    remedy = "install g++, or name a C++ compiler by CXX"
    if status == 127:
        found = f"there is no {compiler}"
    elif "Python.h" in text:
        found, remedy = f"{compiler} finds no Python.h", "install the headers (python3-dev)"
    elif "omp.h" in text or "openmp" in text.lower():
        found, remedy = f"{compiler} has no OpenMP", "install libgomp or libomp"
    else:
        found = f"{compiler} failed"
    yield Finding("compiler", Level.OPTIONAL, f"{found}, needed for --compile", remedy)


def check_browser() -> Iterator[Finding]:
    """Look for what the tests of pages open them with; they are in a clone alone."""
    if not in_clone():
        return
    if shutil.which("chromium"):
        yield Finding("browser", Level.OK, "chromium, for the tests of pages")
    else:
        found = "chromium is not installed, tests of pages are skipped"
        yield Finding("browser", Level.OPTIONAL, found, "apt-get install chromium")


def check_slurm() -> Iterator[Finding]:
    """Find the commands of SLURM, its controller, and the job around this process."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if not shutil.which(name)]
    if is_set("SLURM_JOB_ID"):
        yield from _check_job()
    if len(missing) == 3:
        if not is_set("SLURM_JOB_ID"):
            yield Finding("slurm", Level.OK, "not on this machine")
    elif missing:
        found = f"no {', '.join(missing)} here, needed for launch/train.slurm"
        yield Finding("slurm", Level.WARNING, found, "submit from a login node of the cluster")
    else:
        yield _controller()


def _controller() -> Finding:
    status, text = answer(["scontrol", "ping"])
    if status == 0 and re.search(r"\bUP\b", text):
        _, version = answer(["scontrol", "--version"])
        return Finding("slurm", Level.OK, f"{version.strip()}, its controller answers")
    found = "its commands are here, but no controller answers"
    remedy = "scontrol ping, on a login node of a cluster; a single machine needs none"
    return Finding("slurm", Level.OPTIONAL, found, remedy)


def _check_job() -> Iterator[Finding]:
    """Check that the tasks of a job are what torchrun needs: one on each node."""
    tasks = variable("SLURM_STEP_TASKS_PER_NODE") or variable("SLURM_TASKS_PER_NODE")
    several = re.match(r"\d+", tasks) and not re.fullmatch(r"1(\(x\d+\))?", tasks)
    nodes = variable("SLURM_NNODES") or "1"
    found = f"in a job of {nodes} node{'' if nodes == '1' else 's'}"
    if is_set("SLURM_PROCID") and several and launched_as() is None:
        yield Finding(
            "slurm",
            Level.WARNING,
            f"{found} with {tasks} tasks on a node, none of which is a rank",
            "one task for each node, in which torchrun starts the ranks: launch/train.slurm",
        )
    else:
        yield Finding("slurm", Level.OK, found)
