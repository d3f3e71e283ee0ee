"""A fresh clone in which blocks of the pages run, with small sizes where a page says minutes."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.option_parsers import read_setup
from tests.docs.pages import ROOT
from tests.training import describe_installation

# What is written differently in the clone: {file: (expression, replacement), once}.
SMALLER_FILES = {
    "train/config/demos.py": (r"steps=500,", "steps=40,"),
    "train/config/presets.py": (r"steps=200,", "steps=40,"),
    "launch/quickstart.sh": (
        r"--prompts 4 --max_new_tokens \d+",
        "--prompts 2 --max_new_tokens 16 --repeats 1",
    ),
}
# What is written differently in commands, one after another; options at the end count most.
SMALLER_COMMANDS = (
    (r"--steps \d{3,}", "--steps 40"),
    (r"--repeats \d+", "--repeats 1"),
    (r"--prompts \d+", "--prompts 4"),
    (r"--max_new_tokens \d+", "--max_new_tokens 16"),
    (r"(-m inference\.evaluate .*)", r"\1 --max_tokens 4096"),
    (r"(-m inference\.benchmark .*)", r"\1 --repeats 1 --prompts 4 --max_new_tokens 16"),
    (r"(-m inference\.tune .*)", r"\1 --repeats 1 --prompts 2 --max_new_tokens 16"),
    (r"(-m inference\.report .*)", r"\1 --repeats 1 --prompts 2 --max_new_tokens 16"),
    (r"(-m inference\.oracle .*)", r"\1 --prompts 4 --max_new_tokens 16"),
    (r"(-m inference\.calibrate .*)", r"\1 --prompts 29 --max_new_tokens 4"),
    (r"(-m inference\.skip_search .*)", r"\1 --prompts 4 --max_new_tokens 16 --iterations 4"),
    (r"(-m inference\.train_gate .*)", r"\1 --train_tokens 4096 --epochs 2"),
    (r"(-m inference\.fit_jump .*)", r"\1 --train_tokens 4096"),
    (r"(-m data\.semantic_parsing .*)", r"\1 --examples 600 --held_out 40"),
    (r"(benchmarks/recipes\.py .*)", r"\1 --steps 4"),
    (r"(benchmarks/against_engines\.py .*)", r"\1 --prompts 1 --max_new_tokens 8"),
    (r"(benchmarks/prepare\.py .*)", r"\1 --documents 100 --copies 2 --repeats 1 --vocab_size 400"),
    (r"(benchmarks/ranks\.py .*)", r"\1 --steps 5 --repeats 1"),
    (r"(benchmarks/training_step\.py .*)", r"\1 --size tiny --seq_len 32 --repeats 1"),
    (r"(benchmarks/exit_loss\.py .*)", r"\1 --size tiny --repeats 1"),
    (r"(benchmarks/layer_dropout\.py .*)", r"\1 --size tiny --repeats 1"),
    (r"(benchmarks/checkpoint\.py .*)", r"\1 --dim 64 --n_layers 2"),
    # The suite itself is run elsewhere.
    (r"(bash launch/test\.sh).*", r"\1 tests/test_layout.py"),
    (r"(-m pytest -q) .*", r"\1 tests/test_layout.py"),
    # The environment is the one that runs the tests, see `install`.
    (r"^(python3 -m venv|pip install) .*", ":"),
)
SECONDS = 1200
"""How long a block may take."""


class Clone:
    """A clone of the repository, what is not committed yet included.

    Args:
        folder: Where to put it.
    """

    def __init__(self, folder):
        self.folder = folder
        git("clone", "--quiet", ROOT, folder)
        changed = git("-C", ROOT, "ls-files", "-z", "--modified", "--others", "--exclude-standard")
        for name in filter(None, changed.split("\0")):
            (folder / name).unlink(missing_ok=True)
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        for name, (old, new) in SMALLER_FILES.items():
            text, count = re.subn(old, new, (folder / name).read_text())
            assert count == 1, f"{name}: {old} is no longer there"
            (folder / name).write_text(text)
        install(folder)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VIRTUAL_ENV", "OMP_", "PYTEST"))
        } | {
            "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, block):
        """Run a block; return its exit status and the lines it prints."""
        if block.language == "python":
            command = ["python", "-c", block.text]
        else:
            command = ["bash", "-euo", "pipefail", "-c", smaller(block.text)]
        done = subprocess.run(
            ["timeout", str(SECONDS), *command], cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, re.split(r"[\r\n]+", done.stdout)


def git(*words):
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def smaller(text):
    """Return the commands of a block with small sizes."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    for old, new in SMALLER_COMMANDS:
        lines = [re.sub(old, new, line) for line in lines]
    return "\n".join(lines) + "\n"


def write_entry_points(site, python):
    """Write what an installation makes of the entry points of setup.cfg."""
    describe_installation(site)
    for entry in filter(None, read_setup()["options.entry_points"]["console_scripts"].splitlines()):
        name, module, function = re.fullmatch(r"(\S+) = (\S+):(\S+)", entry).groups()
        script = python.with_name(name)
        script.write_text(
            f"#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)


def install(folder):
    """Make folder/.venv with the packages that run the tests, and with ours as they are there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    python, bin_folder = folder / ".venv" / "bin" / "python", Path(sys.executable).parent
    [site] = (folder / ".venv" / "lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join([str(folder), *borrowed]) + "\n")
    for script in bin_folder.iterdir():
        target = folder / ".venv" / "bin" / script.name
        if not script.is_file() or target.exists():
            continue
        if script.name.startswith(("pip", "python", "activate")):
            continue
        lines = script.read_bytes().split(b"\n", 1)
        if lines[0].startswith(b"#!") and b"python" in lines[0]:
            target.write_bytes(f"#!{python}\n".encode() + lines[1])
            target.chmod(0o755)
        else:
            target.symlink_to(script)
    write_entry_points(site, python)
    stamp = "cat setup.cfg pyproject.toml launch/constraints.txt | cksum >.venv/installed-test"
    subprocess.run(stamp, shell=True, check=True, cwd=folder)
