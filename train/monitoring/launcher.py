"""Whether torchrun, which has started this rank, still runs. Imported before torch is.

A rank without its launcher is nobody's: it holds its GPU and its run folder, and no signal of a
scheduler reaches it. Under anything else (srun, mpirun, nohup) a rank asks nothing.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

SECONDS = 0.5
"""Interval at which `end_with_it` looks."""
ORPHANED = 143
"""Exit status of a rank that ends with its launcher, as of one that SIGTERM ends."""


class Launcher:
    """The process that has started this one, if that is torchrun."""

    def __init__(self) -> None:
        self._elastic = "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid()
        # The agent's own number, from launch/torchrun.py where that is installed. It may have died
        # before this line, or have started us by way of a wrapper.
        number, _, namespace = os.environ.get("SKIPSTONE_LAUNCHER", "").partition(" ")
        self._agent = int(number) if number and namespace == _namespace() else 0

    @property
    def gone(self) -> bool:
        """Whether this rank has outlived it."""
        if not self._elastic:
            return False
        if os.getppid() != self._parent or (self._agent and not _runs(self._agent)):
            return True
        return not self._agent and self._parent == 1 and not _is_python(1)

    def end_with_it(self, until: threading.Event) -> None:
        """End this process at once when the launcher is gone, until the event is set."""

        def watch() -> None:
            while not until.is_set():
                if self.gone:
                    os._exit(ORPHANED)
                until.wait(SECONDS)

        if self._elastic:
            threading.Thread(target=watch, name="launcher", daemon=True).start()


def _runs(pid: int) -> bool:
    """Whether a process is there, and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError, IndexError):  # proc(5): the state follows the name in brackets
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


def _is_python(pid: int) -> bool:
    """Whether a process may be torchrun: in a container it may be the first one."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def _namespace() -> str:
    """Return the namespace in which process numbers hold."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
