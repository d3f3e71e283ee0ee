"""What the main thread of a process runs, as another thread reads it off its stack."""

import os
from pathlib import Path
from types import FrameType

ROOT = f"{Path(__file__).resolve().parents[2]}{os.sep}"


def in_collective(frame: FrameType) -> bool:
    """Whether a stack, given by its innermost frame, is inside a collective."""
    inner: FrameType | None = frame
    while inner is not None and inner.f_code.co_filename.endswith("/torch/_ops.py"):
        inner = inner.f_back
    path = "" if inner is None else inner.f_code.co_filename
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
