"""Which failures end a run for good: those that the same command would meet again.

What failed decides, never who noticed. A setting that cannot work or numbers that stay not finite
are final on any rank. A peer that died, a connection, a signal, a hang or an unknown fault of a
driver is not, on whichever rank it is seen: the run goes on from its newest checkpoint.
"""

import errno
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from data.urls import UnreachableError
from train.monitoring.replica_check import ReplicasDifferError

AGREED = (FloatingPointError, ReplicasDifferError)
"""Failures that all ranks raise together, with one message; rank 0 reports them."""
_FINAL = (
    *AGREED,
    ValueError,  # of a user: every one of ours
    MemoryError,
    torch.OutOfMemoryError,
    # of the program
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)
# fmt: off
_PASSING = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    errno.ENOLCK, errno.ENOTCONN, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT,
}
# fmt: on
"""Errors of a network or of a file server, which pass."""
_COMMUNICATION = re.compile(
    r"connection|socket|\bpeer\b|nccl|gloo|\bstore\b|rendezvous|collective|timed out|time ?out"
    r"|watchdog|broken pipe",
    re.IGNORECASE,
)


def is_final(error: BaseException) -> bool:
    """Whether the same command would fail in the same way again."""
    if any(is_communication(each) or isinstance(each, UnreachableError) for each in _chain(error)):
        return False
    return isinstance(error, (*_FINAL, OSError))


def is_communication(error: BaseException) -> bool:
    """Whether this error, but for its causes, is one of a peer, a connection or a file server."""
    if isinstance(error, (ConnectionError, TimeoutError, EOFError, dist.DistError)):
        return True
    if isinstance(error, OSError):
        return error.errno in _PASSING
    # gloo and NCCL raise plain ones.
    return type(error) is RuntimeError and bool(_COMMUNICATION.search(str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from or during, innermost last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
