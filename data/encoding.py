"""Documents to token ids, over several processes, in order.

The output is the same for any number of processes. Reads no file but the tokenizer's.
Not a ProcessPoolExecutor: that of Python 3.11 may hang when one of its processes is killed
(https://github.com/python/cpython/issues/94777).
"""

import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.row_layout import Document
from data.shards import token_dtype
from data.tokenizer import Tokenizer

_BATCH_CHARS = 500_000
_BATCHES_AHEAD = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_Batch = list[tuple[str, int | None]]
"""Texts and how many characters of each are a prompt, see `data.row_layout.Document`."""

_Tokens = npt.NDArray[np.integer]


def encode_document(tokenizer: Tokenizer, text: str, prompt_chars: int | None = None) -> _Tokens:
    """Return BOS, the ids of the text, EOS: (seq,) as they are stored.

    A prompt is encoded by itself, as it is for generation; BOS and its ids are marked as not to be
    learnt, see `data.shards.ShardHeader`.
    """
    dtype = token_dtype(tokenizer.vocab_size, pairs=prompt_chars is not None)
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=dtype)

    def encode(part: str) -> list[_Tokens]:
        return [np.array(ids, dtype=dtype) for ids in tokenizer.encode_pieces(part)]

    if prompt_chars is None:
        return np.concatenate([bos, *encode(text), eos])
    read = np.concatenate([bos, *encode(text[:prompt_chars])])
    return np.concatenate([~read, *encode(text[prompt_chars:]), eos])


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Document, _Tokens]]:
    """Yield every document with its ids, in the order of `documents`.

    Holds three batches of about half a megabyte of text per worker and, beyond these, at most one
    longer document.

    Args:
        documents: read only as far ahead as the workers need.
        tokenizer: loaded again by each worker from its path.
        workers: number of processes; 1 means this one.

    Raises:
        ValueError: a worker process was killed.
    """
    if workers == 1:
        for document in documents:
            yield document, encode_document(tokenizer, document.text, document.prompt_chars)
        return
    with _start(workers, tokenizer.path) as connections:
        yield from _encode_over(connections, documents)


def _encode_over(
    connections: list[Connection], documents: Iterable[Document]
) -> Iterator[tuple[Document, _Tokens]]:
    """Send batches to the workers in turn, and receive the results in the same order."""
    running: deque[tuple[Connection, list[Document]]] = deque()
    chars = 0
    for connection, batch in zip(cycle(connections), _batches(documents), strict=False):
        with _worker_loss_explained(len(connections)):
            connection.send([(document.text, document.prompt_chars) for document in batch])
        running.append((connection, batch))
        chars += _count_chars(batch)
        while chars >= _BATCHES_AHEAD * len(connections) * _BATCH_CHARS:
            oldest, batch = running.popleft()
            chars -= _count_chars(batch)
            with _worker_loss_explained(len(connections)):
                encoded = oldest.recv()
            yield from zip(batch, encoded, strict=True)
    for oldest, batch in running:
        with _worker_loss_explained(len(connections)):
            encoded = oldest.recv()
        yield from zip(batch, encoded, strict=True)


@contextmanager
def _worker_loss_explained(workers: int) -> Iterator[None]:
    """Turn the loss of a connection into an error with its likely cause."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise ValueError(
            f"workers {workers}: one of them was killed, perhaps for want of memory, give fewer"
        ) from error


def _count_chars(batch: list[Document]) -> int:
    return sum(len(document.text) for document in batch)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@contextmanager
def _start(workers: int, tokenizer: Path) -> Iterator[list[Connection]]:
    """Start the processes, and end them with the context."""
    # A forked child would inherit the threads' locks of a caller that has imported torch.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # Its start would unblock the signals.
    connections, processes = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, tokenizer), daemon=True)
            with _signals_left_to_this_process():
                process.start()
            theirs.close()  # Else its end would stay open after the process has exited.
            connections.append(ours)
            processes.append(process)
        yield connections
    finally:
        for connection, process in zip(connections, processes, strict=True):
            connection.close()
            process.kill()
            process.join()


@contextmanager
def _signals_left_to_this_process() -> Iterator[None]:
    """Keep from a process that is started now the signals that a terminal or SLURM sends to all.

    It inherits that they are blocked, from its first moment; this process gets them a little later.
    """
    resource_tracker.ensure_running()  # which would unblock two of them as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, path: Path) -> None:
    """Encode batches until the connection closes."""
    batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
    # Without a thread both sides could block in send, each for the other to receive.
    threading.Thread(target=_receive, args=(connection, batches), daemon=True).start()
    tokenizer = Tokenizer(path)
    while (batch := batches.get()) is not None:
        with suppress(ConnectionError):  # The parent may have exited; then no batch follows.
            connection.send([encode_document(tokenizer, *document) for document in batch])


def _receive(connection: Connection, batches: "queue.SimpleQueue[_Batch | None]") -> None:
    try:
        while True:
            batches.put(connection.recv())
    except (EOFError, OSError):  # The parent has exited, perhaps in the middle of a batch.
        batches.put(None)
