"""How torchrun ends when it runs our training: quietly, unless a rank has crashed.

torchrun ends whatever does not succeed with a traceback of its own and a table of the ranks: some
35 lines below a user's error of one line, some 25 below a Ctrl-C after which everything is saved.
torch imports this file in torchrun's process, as one of the entry points `torchrun.handlers` of
setup.cfg. It changes what that process prints when it ends, for train/main.py alone.
"""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

SCRIPT = Path(__file__).resolve().parent.parent / "train" / "main.py"
MODULE = "train.main"
USER_ERROR = 2
"""Exit status of a rank that has ended with a user's error, which is on the screen."""
_TERMINATED = -15
_CHATTER = (
    r"Received .* death signal, shutting down workers",
    r"Sending process .* closing signal",
    rf"failed \(exitcode: {USER_ERROR}\)",
)


def rendezvous_handler() -> Callable[[object], object]:
    """Prepare for a quiet end, if this process is to run our training.

    What is returned is registered as a rendezvous backend, which this is not.
    """
    if runs_training(sys.argv[1:]):
        end_quietly()
    return _refuse


def runs_training(words: Sequence[str]) -> bool:
    """Whether torchrun's arguments name our script or our module."""
    return any(word == MODULE or Path(word).resolve() == SCRIPT for word in words)


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
        raise SystemExit(128 + error.sigval)
    if isinstance(error, ChildFailedError):
        statuses = {failure.exitcode for failure in error.failures.values()}
        if USER_ERROR in statuses <= {USER_ERROR, _TERMINATED}:
            raise SystemExit(USER_ERROR)
    sys.__excepthook__(kind, error, traceback)


def _refuse(parameters: object) -> object:
    raise ValueError("rdzv_backend: skipstone is none, choose c10d")
