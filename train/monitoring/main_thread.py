"""What the main thread of a process runs, as another thread reads it off its stack."""

import os
from pathlib import Path
from types import FrameType

ROOT = f"{Path(__file__).resolve().parents[2]}{os.sep}"


def waits(frame: FrameType) -> bool:
    """Whether a stack, given by its innermost frame, waits for other ranks.

    On CPUs it is inside a collective then. On GPUs collectives are queued, and the host waits for
    the device, which waits for the others: in `synchronize` of an event, a stream or a device.
    """
    inner: FrameType | None = frame
    while inner is not None and inner.f_code.co_filename.endswith("/torch/_ops.py"):
        inner = inner.f_back
    if inner is None:
        return False
    path = inner.f_code.co_filename
    if "/torch/cuda/" in path:
        return inner.f_code.co_name == "synchronize"
    return "/torch/distributed/" in path and "/torch/distributed/tensor/" not in path


def innermost_line(frame: FrameType) -> str:
    """Return the innermost line of this repository on a stack, as path:line (function)."""
    inner: FrameType | None = frame
    while inner is not None:
        path = inner.f_code.co_filename
        if path.startswith(ROOT) and "/site-packages/" not in path:
            return f"{path.removeprefix(ROOT)}:{inner.f_lineno} ({inner.f_code.co_name})"
        inner = inner.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
