"""The training command on a tiny corpus, as a user runs it."""

import os
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent

TINY = {
    "steps": 8,
    "parallel.shard": "blocks",
    "model.dim": 16,
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.ffn_dim": 32,
    "model.vocab_size": 400,
    "model.max_seq_len": 32,
    "data.input": None,
    "data.seq_len": 16,
    "data.global_batch_size": 8,
    "data.microbatch_size": 2,
    "optim.lr": 3e-3,
    "optim.warmup_steps": 2,
    "layer_dropout.p_max": 0.5,
    "curriculum.R": 3,
    "validate.interval_steps": 4,
    "validate.sequences": 8,
    "speculation.interval_steps": 0,
    "checkpoint.interval_steps": 3,
    "metrics.interval_steps": 2,
}


def describe_installation(folder: Path) -> None:
    """Write what an installation of this tree leaves of its entry points, for torchrun to find."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    info = folder / "skipstone-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: skipstone\nVersion: 0\n")
    groups = settings["options.entry_points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *names.split("\n"))]
    (info / "entry_points.txt").write_text("\n".join(lines))


class Training:
    """The training command with tiny settings."""

    def __init__(self, corpus: Path, output: Path):
        self.output = output
        self._installation = output.parent / "installation"
        describe_installation(self._installation)
        self.fields = TINY | {"data.path": corpus, "output_dir": output}

    def arguments(self, *, preset="demo", **overrides):
        fields = self.fields | {k.replace("__", "."): v for k, v in overrides.items()}
        options = [[f"--{k}", *str("" if v is None else v).split()] for k, v in fields.items()]
        return [preset, *(word for option in options for word in option)]

    def command(self, *, ranks=0, launcher=(), script="train/main.py", **arguments):
        command = [sys.executable]
        if ranks:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [*command, *launcher, script, *self.arguments(**arguments)]

    def start(self, *, environment=None, **arguments):
        path = [str(self._installation), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            self.command(**arguments),
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
            | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, **arguments):
        """Return the exit status and all output of the finished command."""
        process = self.start(**arguments)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def run_killed_after(self, line, **arguments):
        """Kill every process of the job once `line` is printed; return the output until then."""
        process, seen = self.start(**arguments), []
        deadline = time.monotonic() + 200
        for text in process.stdout:
            seen.append(text)
            if line in text or time.monotonic() > deadline:
                break
        # torchrun's workers lead sessions of their own.
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        )
        for pid in [*map(int, workers.stdout.split()), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return "".join(seen)
