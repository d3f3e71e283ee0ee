"""How torchrun runs our training: it ends quietly, unless a rank has crashed, and stops in time.

torchrun ends whatever does not succeed with a traceback of its own and a table of the ranks: some
35 lines below a user's error of one line, some 25 below a Ctrl-C after which everything is saved.
torch imports this file in torchrun's process, as one of the entry points `torchrun.handlers` of
setup.cfg. It changes what that process prints when it ends, has it restart no rank that would fail
in the same way again, and names it to its ranks; for train/main.py and train/doctor.py alone.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

SCRIPT = Path(__file__).resolve().parent.parent / "train" / "main.py"
MODULES = ("train.main", "train.doctor")
SCRIPTS = (SCRIPT, SCRIPT.with_name("doctor.py"))
USER_ERROR = 2
"""Exit status of a rank whose error a restart would meet again, and which is on the screen."""
_CHATTER = (
    r"Received .* death signal, shutting down workers",
    r"Sending process .* closing signal",
    rf"failed \(exitcode: {USER_ERROR}\)",
)


def rendezvous_handler() -> Callable[[object], object]:
    """Prepare this process, if it is to run our training.

    What is returned is registered as a rendezvous backend, which this is not.
    """
    if runs_training(sys.argv[1:]):
        prepare()
    return _refuse


def runs_training(words: Sequence[str]) -> bool:
    """Whether torchrun's arguments name a script or module of ours that it starts."""
    return any(word in MODULES or Path(word).resolve() in SCRIPTS for word in words)


def prepare() -> None:
    """Do all that this file is for, in the process of torchrun."""
    _name_this_process()
    _restart_no_user_error()
    end_quietly()


def _name_this_process() -> None:
    """Name it to the ranks, which inherit its environment and stop when it has died."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    os.environ["SKIPSTONE_LAUNCHER"] = f"{os.getpid()} {namespace}"


def _restart_no_user_error() -> None:
    """Let an error that a restart would meet again end the agent, in spite of --max-restarts."""
    from torch.distributed.elastic.multiprocessing.api import PContext, RunProcsResult
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    wait = PContext.wait

    def wait_for_ranks(
        context: PContext, timeout: float = -1, period: float = 1
    ) -> RunProcsResult | None:
        result = wait(context, timeout, period)
        failures = result.failures if result else {}
        if any(failure.exitcode == USER_ERROR for failure in failures.values()):
            raise ChildFailedError(str(SCRIPT), failures)
        return result

    PContext.wait = wait_for_ranks  # type: ignore[method-assign, assignment]


def end_quietly() -> None:
    """Leave out what torchrun prints about an end that a rank has already reported."""
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(
            lambda record: not re.match("|".join(_CHATTER), record.getMessage())
        )
    sys.excepthook = _report


def _report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, KeyboardInterrupt):
        raise SystemExit(130)
    if isinstance(error, SignalException):
        planned = error.sigval in (signal.SIGTERM, signal.SIGUSR1) and "SLURM_STEP_ID" in os.environ
        raise SystemExit(0 if planned else 128 + error.sigval)  # srun would call it a failure
    if isinstance(error, ChildFailedError):
        statuses = {failure.exitcode for failure in error.failures.values()}
        if USER_ERROR in statuses:  # the others ended for its sake
            raise SystemExit(USER_ERROR)
    sys.__excepthook__(kind, error, traceback)


def _refuse(parameters: object) -> object:
    raise ValueError("rdzv_backend: skipstone is none, choose c10d")
