"""The blocks of one run of benchmarks/gpu.py: budget, output, and what they share."""

import gc
import json
import platform
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Block:
    """A part of the run."""

    name: str
    needs_seconds: float
    """Left out where less is left, at size full."""
    run: "Callable[[Session], dict[str, object]]"
    """Returns its results, as JSON can hold them."""


@dataclass
class Session:
    """What the blocks share; closes the process group and removes its files."""

    device: torch.device
    tiny: bool
    ends: float
    """When the budget is used up, by time.monotonic."""
    path: Path | None
    """JSON of the results."""
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str]] = field(default_factory=list)
    """(what, how much), of the table at the end."""
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.ends - time.monotonic()

    @cached_property
    def runtime(self) -> Any:
        """The process group of this one process."""
        from train.parallel.runtime import RuntimeConfig, start_runtime

        started = self.stack.enter_context(start_runtime(RuntimeConfig(), seed=0))
        return started if self.on_gpu else replace(started, device=self.device)

    @cached_property
    def folder(self) -> Path:
        """A temporary folder."""
        made = Path(tempfile.mkdtemp(prefix="gpu-"))
        self.stack.callback(shutil.rmtree, made, ignore_errors=True)
        return made

    def row(self, what: str, value: str) -> None:
        """Print a result, and put it into the table."""
        self.rows.append((what, value))
        print(f"  {what:56s} {value}", flush=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], *, times: int = 5, warm: int = 2) -> float:
        """Return the median time of an action, waited for."""
        taken = []
        for i in range(warm + times):
            self.wait()
            begin = time.perf_counter()
            action()
            self.wait()
            if i >= warm:
                taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def write(self) -> None:
        """Write what there is."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.results, indent=1, default=str) + "\n")


def run_blocks(session: Session, blocks: Sequence[Block]) -> int:
    """Run the blocks one after the other, print the table, and return 1 if one has failed."""
    session.results["machine"] = _machine(session)
    print(json.dumps(session.results["machine"]), flush=True)
    failed = 0
    for block in blocks:
        begin = time.monotonic()
        print(f"== {block.name}, {session.left:.0f} s left", flush=True)
        if session.left < (0 if session.tiny else block.needs_seconds):
            found: dict[str, object] = {"outcome": f"left out, {session.left:.0f} s left"}
            session.row(block.name, "left out, no time")
        else:
            found = _caught(session, block)
            failed += found["outcome"] == "failed"
        session.results[block.name] = found | {"seconds": round(time.monotonic() - begin, 2)}
        session.write()
        gc.collect()
        if session.on_gpu:
            torch.cuda.empty_cache()
    print("\n" + "\n".join(f"| {what:56s} | {value} |" for what, value in session.rows))
    print(f"{len(blocks)} blocks, {failed} failed", flush=True)
    return int(failed > 0)


def _caught(session: Session, block: Block) -> dict[str, object]:
    try:
        return {"outcome": "done"} | block.run(session)
    except ModuleNotFoundError as error:
        reason = f"{error.name} is missing, bring the wheels of benchmarks/gpu_wheels.sh"
        text = reason
    except Exception as error:  # one block may not cost the others
        text, reason = traceback.format_exc(), f"{type(error).__name__}: {error}".splitlines()[0]
        print(text, flush=True)
    session.row(block.name, f"FAILED, {reason[:100]}")
    return {"outcome": "failed", "reason": text}


def _machine(session: Session) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if session.on_gpu else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "size": "tiny" if session.tiny else "full",
        "date": time.strftime("%Y-%m-%d"),
    }
