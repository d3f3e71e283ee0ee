"""Whether the ranks meet as in training: one store, one process group, one all-reduce.

Imports torch, through train/parallel, in the process of a check alone. A rank writes into the store
how far it is and what has failed, so that rank 0 can name the one that all wait for.
"""

import importlib.metadata
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from train.diagnosis.findings import Check, Finding, Level, one_line
from train.diagnosis.surroundings import become_rank, variable

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from train.parallel.runtime import Runtime

IMPORTED_WITHIN_SECONDS = 120.0
"""How long torch may take to be imported, from a network disk; not part of the ranks' limit."""
LEAVE_SECONDS = 5.0
"""How long the process group may take to be left."""
HEARD_SECONDS = 1.0
"""How long the other ranks have to see that one has failed, and to fail too."""
MIB = {"cpu": 16, "cuda": 256}
"""What is added over the ranks, to measure."""
REPEATS = 3
STAGES = ("did not come", "came and did not join the group", "did not end the all-reduce")
_NETWORK = (
    "name the network that all hosts share, {0}_SOCKET_IFNAME=..., and let a firewall pass it"
)
_ERRORS = (RuntimeError, OSError, ValueError)
"""What torch raises; its own are RuntimeErrors."""
_ALIKE = ("torch", "torchtitan", "numpy")


def spawn_ranks(count: int, seconds: float) -> Iterator[Finding]:
    """Run ranks of our own on this machine, and yield what rank 0 finds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checks = [start_rank(rank, count, seconds, port=port) for rank in range(count)]
    try:
        yield from checks[0].findings()
    finally:
        for check in checks:
            check.stop()


def start_rank(
    rank: int, count: int, seconds: float, notes: Sequence[Finding] = (), port: int | None = None
) -> Check:
    """Start one rank in a process of its own.

    Args:
        rank: Its number.
        count: Of ranks.
        seconds: How long it waits for the others.
        notes: What its machine has found before, for rank 0 to print.
        port: Where rank 0 serves the store; None where torchrun has set it.
    """
    return Check(
        "ranks",
        join_ranks,
        *(rank, count, seconds, list(notes), port),
        seconds=seconds + IMPORTED_WITHIN_SECONDS,
        remedy="py-spy dump, on the process of that rank",
    )


def join_ranks(
    rank: int, count: int, seconds: float, notes: list[Finding], port: int | None
) -> Iterator[Finding]:
    """Join the other ranks and add with them; what `start_rank` runs."""
    if port is not None:
        become_rank(rank, count, port)
    import torch

    import train.parallel.runtime  # noqa: F401  # before the time is measured

    backend = "NCCL" if torch.cuda.is_available() else "gloo"
    meeting = Meeting(rank, count, seconds, notes, backend)
    worker = threading.Thread(target=meeting.run, daemon=True)
    worker.start()
    until = time.monotonic() + seconds
    while worker.is_alive() and time.monotonic() < until:
        worker.join(0.2)
        if meeting.found or (rank == 0 and meeting.failure()):
            break
    if meeting.found is None:
        yield meeting.trouble()
        return
    worker.join(LEAVE_SECONDS)
    yield from meeting.found


class Meeting:
    """This rank's way to the others, in a thread that may wait for ever.

    Args:
        rank: Its number.
        count: Of ranks.
        seconds: How long it waits for the others.
        notes: For rank 0 to print.
        backend: NCCL or gloo.
    """

    def __init__(
        self, rank: int, count: int, seconds: float, notes: list[Finding], backend: str
    ) -> None:
        self._rank, self._count, self._seconds, self._notes = rank, count, seconds, notes
        self._backend = backend
        self._store: Store | None = None
        self._watched: Store | None = None
        self._error = ""
        self.found: list[Finding] | None = None
        """What came out, once the ranks have met."""

    def run(self) -> None:
        """Meet the others."""
        from train.parallel.runtime import RuntimeConfig, connect_store, shared_store, start_runtime

        wait = max(int(self._seconds), 1)
        config = RuntimeConfig(timeout_seconds=wait, setup_timeout_seconds=wait)
        try:
            self._store = shared_store(self._rank, self._count)
            self._watched = connect_store()  # one connection cannot wait and look
            self._store.set(f"doctor-came-{self._rank}", "")
            with start_runtime(config, seed=0) as runtime:
                try:
                    self._store.set(f"doctor-joined-{self._rank}", "")
                    found = [_added(runtime, self._backend), *_compared(runtime, self._notes)]
                    self._store.set(f"doctor-added-{self._rank}", "")
                    self.found = found
                except _ERRORS as error:  # written before it leaves, which others fail of
                    self._fail(error)
                    raise
        except _ERRORS as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Write the first error of this rank into the store."""
        if self._error:
            return
        self._error = f"rank {self._rank} failed: {one_line(error)}"
        with suppress(*_ERRORS):  # rank 0 is gone, with the store
            if self._store is not None:
                self._store.set(f"doctor-failed-{self._rank}", "")
                number = self._store.add("doctor-failures", 1)
                self._store.set(f"doctor-failure-{number}", self._error)

    def failure(self) -> str:
        """Return what the first rank that failed has failed with, empty where none has."""
        if self._watched is None:
            return self._error
        with suppress(*_ERRORS):
            if self._watched.check(["doctor-failure-1"]):
                return self._watched.get("doctor-failure-1").decode(errors="replace")
        return self._error

    def trouble(self) -> Finding:
        """Return which rank has failed, or which are the furthest behind when time is up."""
        if self._watched is None:
            at = f"{variable('MASTER_ADDR')}:{variable('MASTER_PORT')}"
            found = self._error or f"no answer within {self._seconds:g} s"
            remedy = "start rank 0 there, and let a firewall pass that port"
            return _problem(f"the store of rank 0 at {at}: {found}", remedy)
        remedy = _NETWORK.format(self._backend.upper())
        try:
            if failure := self.failure():
                time.sleep(HEARD_SECONDS)
                silent = self._without("failed", "added")
                found = f"{failure}; nothing of {_named(silent)} since" if silent else failure
                return _problem(found, remedy)
            stage, behind = self._behind()
        except _ERRORS as error:
            return _problem(f"the store of rank 0 is gone, {one_line(error)}", "see its output")
        if stage == 0:
            remedy = "see the output of that rank; is it started, can it reach MASTER_ADDR?"
        elif stage == 2 and self._backend == "NCCL":
            remedy = "NCCL_DEBUG=INFO shows where; try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
        return _problem(f"{_named(behind)} {STAGES[stage]} within {self._seconds:g} s", remedy)

    def _behind(self) -> tuple[int, list[int]]:
        """Return the stage that not all ranks have reached, and the ranks that have not."""
        for stage, name in enumerate(("came", "joined", "added")):
            if behind := self._without(name):
                return stage, behind
        return 2, [*range(self._count)]  # it has ended since

    def _without(self, *names: str) -> list[int]:
        """Return the ranks that have written none of these."""
        assert self._watched is not None
        return [
            rank
            for rank in range(self._count)
            if not any(self._watched.check([f"doctor-{name}-{rank}"]) for name in names)
        ]


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


def _problem(found: str, remedy: str) -> Finding:
    return Finding("ranks", Level.PROBLEM, found, remedy)


def _added(runtime: "Runtime", backend: str) -> Finding:
    """Add numbers over the ranks, and measure it."""
    import torch

    size = MIB[runtime.device.type] << 18  # fp32
    numbers = torch.full((size,), runtime.rank + 1.0, device=runtime.device)
    runtime.sum_over_ranks(numbers)
    right = bool((numbers == runtime.world_size * (runtime.world_size + 1) / 2).all())
    begun = time.perf_counter()
    for _ in range(REPEATS):
        runtime.sum_over_ranks(numbers)
    float(numbers[0])  # waits for the GPU
    seconds = (time.perf_counter() - begun) / REPEATS
    if not right:
        return _problem(f"{backend} added wrongly over {runtime.world_size} ranks", "see gpu above")
    speed = 4 * size / seconds
    return Finding(
        "ranks",
        Level.OK,
        f"{runtime.world_size} by {backend}, all-reduce of {size >> 18} MiB in "
        f"{1e3 * seconds:.1f} ms ({speed / 1e9:.2f} GB/s)",
        details={"ranks": runtime.world_size, "backend": backend, "bytes_per_second": round(speed)},
    )


def _compared(runtime: "Runtime", notes: list[Finding]) -> Iterator[Finding]:
    """Yield what other machines have found, and the ranks with other packages than rank 0."""
    versions = {name: importlib.metadata.version(name) for name in _ALIKE}
    everyone = runtime.gather((versions, runtime.device_name(), notes))
    first, device, _ = everyone[0]
    for rank, (other, its_device, its_notes) in enumerate(everyone):
        for note in its_notes if rank else ():
            text = f"on the machine of rank {rank}: {note.found}"
            yield Finding(note.check, note.level, text, note.remedy)
        for name in (name for name in _ALIKE if other[name] != first[name]):
            found = f"{name} is {other[name]} on rank {rank}, {first[name]} on rank 0"
            yield _problem(found, "the same environment on every machine")
        if its_device != device:
            found = f"rank {rank} has {its_device}, rank 0 {device}: the slower one decides"
            yield Finding("ranks", Level.WARNING, found, "machines of one kind")
