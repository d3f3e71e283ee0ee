"""Processes that work on one item after another, whichever of them is free.

Not a ProcessPoolExecutor: that of Python 3.11 may hang when one of its processes is killed
(https://github.com/python/cpython/issues/94777).
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

_EXIT_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Workers:
    """Processes that share work; none is started where there is one alone.

    Args:
        count: number of processes.
        connections: to each of them; empty where this process does the work.
    """

    def __init__(self, count: int, connections: list[Connection]) -> None:
        self.count = count
        self._connections = connections

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield work(item) of every item, in the order in which they are done.

        Args:
            work: sent to each process once, and called there; what it keeps stays there.
            items: begun in their order.

        Raises:
            ValueError: a process was killed, or what was raised for the earliest item.
            OSError: what was raised for the earliest item.
        """
        if not self._connections:
            yield from map(work, items)
            return
        numbered, failures = enumerate(items), dict[int, Exception]()
        running = dict[Connection, int]()
        with _loss_explained(self.count):
            for connection in self._connections:
                connection.send(work)
                _send_next(connection, numbered, running)
        while running:
            for connection in cast(list[Connection], wait([*running])):
                number = running.pop(connection)
                with _loss_explained(self.count):
                    result = connection.recv()
                if isinstance(result, _Failure):
                    failures[number] = result.error  # Others end what they have begun, see below.
                elif not failures:
                    with _loss_explained(self.count):
                        _send_next(connection, numbered, running)
                    yield result
        if failures:
            raise failures[min(failures)]


class _Item(NamedTuple):
    """What the work that was sent before is to be called with."""

    value: Any


class _Failure(NamedTuple):
    """What a worker raised."""

    error: Exception


def _send_next(
    connection: Connection, numbered: Iterator[tuple[int, Any]], running: dict[Connection, int]
) -> None:
    for number, item in numbered:
        connection.send(_Item(item))
        running[connection] = number
        return


@contextmanager
def _loss_explained(count: int) -> Iterator[None]:
    """Turn the loss of a connection into an error with its likely cause."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise ValueError(
            f"workers {count}: one of them was killed, perhaps for want of memory, give fewer"
        ) from error


@contextmanager
def start_workers(count: int) -> Iterator[Workers]:
    """Start the processes, and end them with the context; none for a count of 1.

    They are spawned: a script that calls this needs an `if __name__ == "__main__"` guard.
    """
    if count == 1:
        yield Workers(1, [])
        return
    # A forked child would inherit the threads' locks of a caller that has imported torch.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # Its start would unblock the signals.
    connections, processes = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _signals_left_to_this_process():
                process.start()
            theirs.close()  # Else its end would stay open after the process has exited.
            connections.append(ours)
            processes.append(process)
        yield Workers(count, connections)
        with suppress(OSError):
            for connection in connections:
                connection.send(None)  # So that they give back what their libraries hold.
        for process in processes:
            process.join(_EXIT_SECONDS)
    finally:
        for process in processes:
            process.kill()
        for connection, process in zip(connections, processes, strict=True):
            connection.close()
            process.join()


@contextmanager
def _signals_left_to_this_process() -> Iterator[None]:
    """Keep from a process that is started now the signals that a terminal or SLURM sends to all.

    It inherits that they are blocked, from its first moment; this process gets them a little later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """Do what comes, until the connection closes."""
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    work: Callable[[Any], Any] | None = None
    while (given := received.get()) is not None:
        if not isinstance(given, _Item):
            work = given
            continue
        assert work is not None
        try:
            result = work(given.value)
        except (ValueError, OSError) as error:
            result = _Failure(error)
        with suppress(ConnectionError):  # The parent may have exited.
            connection.send(result)


def _receive(connection: Connection, received: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            received.put(connection.recv())
    except (EOFError, OSError):  # The parent has exited, perhaps in the middle of a piece.
        os._exit(1)
