"""Start whole training jobs in a blink: ranks are forked from a process that has all imported.

`torchrun` and its ranks take seconds to import; here they are forked from one warm process, with
the environment torchrun would set. As under torchrun, a rank that fails takes the others down:
SIGTERM, and SIGKILL a little later. Tests of torchrun itself use the real one.

Run as a script, this is the warm process: it reads one JSON job a line and answers with its pid.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
WARM = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    # Imports ask for GPUs by the driver's library: after CUDA itself, no fork may use one.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
KILL_AFTER_SECONDS = 10.0
AGREED = 2
"""Exit status of an error that all ranks know of, and end with."""
AGREED_WITHIN_SECONDS = 5.0
"""How long after one rank has ended with it the others are left in peace."""


class Job:
    """A training job that has been started."""

    def __init__(self, leader, folder, run):
        self.leader, self.folder, self.run = leader, folder, run

    @property
    def pids(self):
        """Return the ranks' process numbers, by rank."""
        return json.loads(_wait_for(self.folder / "pids").read_text())

    @property
    def output(self):
        """Return all that the ranks have printed so far."""
        path = self.folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_line(self, text, timeout=180):
        """Wait until `text` is printed."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s:\n{self.output}"
            assert not (self.folder / "statuses").exists(), f"no {text!r}, ended:\n{self.output}"
            time.sleep(0.01)

    def wait(self, timeout=180):
        """Return the exit status of every rank; negative: the signal that ended it."""
        try:
            return json.loads(_wait_for(self.folder / "statuses", timeout).read_text())
        except TimeoutError:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def kill(self):
        """Kill every rank, as a power cut would."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self


class Launcher:
    """The warm process, seen from the tests."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            cwd=ROOT,
            env=os.environ | WARM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder, run, arguments, *, ranks=2, faults=(), environment=None):
        """Start a job whose output and exit statuses go to `folder`."""
        folder.mkdir(parents=True)
        job = {
            "folder": str(folder),
            "arguments": [str(word) for word in arguments],
            "ranks": ranks,
            "faults": list(faults),
            "environment": environment or {},
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Job(int(self._process.stdout.readline()), folder, run)

    def close(self):
        """End the warm process; it holds nothing, and a fork of ours may hold its stdin open."""
        self._process.kill()
        self._process.wait()


def _wait_for(path, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)
    return path


def _serve():
    """Fork a leader for each job that is asked for."""
    import torch._dynamo  # noqa: F401  what torch would import when a run initialises its weights

    import train.main  # noqa: F401  what takes the seconds
    from train.config.command_line import parse

    parse([], show=False)  # reads the sources that document the options
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaders are not waited for
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            _lead(job)
        print(pid, flush=True)


def _lead(job):
    """Fork the ranks, wait for them, and write down how they ended."""
    folder = Path(job["folder"])
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            _run_rank(rank, port, job)
        pids.append(pid)
    _write(folder / "pids", pids)
    statuses, stop_at, kill_at = {}, None, None
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] and stop_at is None:
                stop_at = time.monotonic()
                stop_at += AGREED_WITHIN_SECONDS if statuses[pid] == AGREED else 0.0
        elif kill_at is None and stop_at is not None and time.monotonic() > stop_at:
            kill_at = time.monotonic() + KILL_AFTER_SECONDS
            _signal_all(set(pids) - set(statuses), signal.SIGTERM)
        elif kill_at is not None and time.monotonic() > kill_at:
            _signal_all(set(pids) - set(statuses), signal.SIGKILL)
            time.sleep(0.1)
        else:
            time.sleep(0.01)
    _write(folder / "statuses", [statuses[pid] for pid in pids])
    os._exit(0)


def _run_rank(rank, port, job):
    """Be one rank: set what torchrun sets, bring the faults in, and train."""
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "none",
        } | job["environment"]
        import torch

        from tests.faults import faults
        from train.main import main

        torch.set_num_threads(1)
        for name, arguments in job["faults"]:
            getattr(faults, name)(rank, **arguments)
        code = main(job["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _signal_all(pids, number):
    for pid in pids:
        os.kill(pid, number)


def _write(path, value):
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value))
    aside.rename(path)


if __name__ == "__main__":
    _serve()
