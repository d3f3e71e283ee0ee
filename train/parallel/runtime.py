"""The process: its rank, its device, its end, and agreement with the other ranks.

The only file that reads environment variables or sets global torch state.
"""

import atexit
import logging
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from data.output_streams import open_closed_streams

T = TypeVar("T")
logger = logging.getLogger(__name__)

USER_ERROR = 2
"""Exit status after a user's error, which one rank has printed."""
EXIT_WITHIN_SECONDS = 30.0
"""Longest wait for what libraries do when a process exits."""
PRINTED_WITHIN_SECONDS = 60.0
"""Longest wait of a rank for another of its node to print their error and exit."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the processes run."""

    timeout_seconds: int = 600
    """A rank that stays longer than this in one step or one validation has hung: it is named, all
    stacks are written to the run folder and the job ends."""
    setup_timeout_seconds: int = 3600
    """The same while data is prepared and checkpoints are written or verified."""
    status_file: str = ""
    """Also write the run's status.json here, where a job script finds it. Empty: the run folder
    alone."""
    deterministic: bool = False
    """Only CUDA kernels whose result is the same in every run: the backward of attention is not,
    else. Slower; CPUs have no others."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        return [
            f"runtime.{name}: {getattr(self, name)}, must be at least 1"
            for name in ("timeout_seconds", "setup_timeout_seconds")
            if getattr(self, name) < 1
        ]


@dataclass(frozen=True)
class Runtime:
    """One rank of the job."""

    rank: int
    world_size: int
    device: torch.device
    job: str
    """Names the job across restarts and requeues; empty where nothing does."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and the console."""
        return self.rank == 0

    def on_every_rank(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where it fails on any, all raise and rank 0 has the message.

        Raises:
            ValueError: On rank 0, with the message of the first rank whose action raised one.
            SystemExit: On the other ranks.
        """
        caught, result = None, None
        try:
            result = action()
        except ValueError as error:
            caught = error
        messages = self.gather(None if caught is None else str(caught))
        failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
        if failed:
            if not self.is_main:
                raise SystemExit(USER_ERROR)
            rank, text = failed[0]
            raise caught if caught and rank == 0 else ValueError(f"{text} (on rank {rank})")
        return result  # type: ignore[return-value]

    def main_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, then on the others, which find what it left on disk."""
        if not self.is_main:
            self.on_every_rank(lambda: None)
            return self.on_every_rank(action)
        result = self.on_every_rank(action)
        self.on_every_rank(lambda: None)
        return result

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def peak_memory_bytes(self) -> int:
        """Return the most memory this rank has held: of its GPU, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def device_name(self) -> str:
        """Return the vendor's name of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return platform.processor() or platform.machine()


def is_main_process() -> bool:
    """Whether this process is rank 0, also before the process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_of_node() -> bool:
    """Whether this process is the first of those that torchrun has started on this node."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def launched_ranks() -> int:
    """Return how many ranks torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_process(
    main: Callable[[], int], stop_requested: Callable[[], bool] = lambda: False
) -> NoReturn:
    """Run `main`, which closes what it opens, and end with its status.

    SystemExit(USER_ERROR) is the end of a rank whose error another rank prints. It waits: torchrun
    kills the other ranks as soon as one has failed, also the one that is about to print. SIGTERM,
    which may have come already and was noted then, ends it at once: nothing is left to save.

    The process ends at once: on torch 2.13, the threads of a process group that is gone abort one
    in some fifty processes while their libraries are taken down, and torchrun then takes a rank
    that had finished for one that died.
    """
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status == USER_ERROR and not is_first_of_node():
            wait_to_be_ended(0 if stop_requested() else PRINTED_WITHIN_SECONDS)
            if not stop_requested():
                logger.warning("ends with an error that no rank of this node has printed")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # --help | head
        status = 128 + signal.SIGPIPE
    # W&B waits for its server at exit, however long that is away.
    latest = threading.Timer(EXIT_WITHIN_SECONDS, os._exit, [status])
    latest.daemon = True
    latest.start()
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe, a full disk
            stream.flush()
    os._exit(status)


def wait_to_be_ended(seconds: float) -> None:
    """Leave torchrun so long to end this rank, as it does when another has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def start_logging() -> None:
    """Send INFO of rank 0, and WARNING of every other rank with its number, to stderr."""
    open_closed_streams()
    rank = int(os.environ.get("RANK", "0"))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"{prefix}%(message)s",
        force=True,
    )
    # torchtitan logs by the root logger; of that, only warnings are for our users.
    logging.getLogger().handlers[0].addFilter(
        lambda record: record.name != "root" or record.levelno >= logging.WARNING
    )


@contextmanager
def start_runtime(config: RuntimeConfig, seed: int) -> Iterator[Runtime]:
    """Join the process group (NCCL on GPUs, gloo on CPUs), and leave it in order.

    Reads what torchrun sets; without torchrun the process is alone.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = launched_ranks()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It would also write NaN over all new memory, which costs time and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=shared_store(rank, world_size),
        rank=rank,
        world_size=world_size,
        # The watchdog is to report first: it names the rank.
        timeout=timedelta(seconds=2 * max(config.timeout_seconds, config.setup_timeout_seconds)),
    )
    try:
        yield Runtime(rank, world_size, device, launched_job())
        # torch 2.11 now and then aborts where a rank leaves while another still communicates.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def connect_store() -> Store:
    """Return a connection of its own to the store all ranks share, for another thread to use."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()  # type: ignore[attr-defined]
    return _of_this_attempt(_tcp_store(is_master=False))


def shared_store(rank: int, world_size: int) -> Store:
    """Return the store that the process group is formed over."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()  # type: ignore[attr-defined]
    torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _of_this_attempt(_tcp_store(is_master=rank == 0 and not torchrun_serves))


def _tcp_store(*, is_master: bool) -> Store:
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_master,
        timeout=timedelta(seconds=300),
        wait_for_workers=False,
        multi_tenant=is_master,
    )


def _of_this_attempt(store: Store) -> Store:
    """Keep this attempt's keys apart from those of the ranks before a restart of torchrun.

    Its store outlives the ranks, and new ones would connect to the addresses of dead ones
    (pytorch#167288). Restarts are counted by each node, and only one node's count is everybody's:
    on several, launch/env.sh has torchrun make a new store for every attempt.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def launched_job() -> str:
    """Return what names the job across restarts and requeues; empty where nothing does."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name
