"""Documents to token ids, over several processes, in order.

The output is the same for any number of processes. Knows nothing of files but the tokenizer's.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.shards import token_dtype
from data.sources import Document
from data.tokenizer import Tokenizer

_BATCH_CHARS = 500_000
_BATCHES_AHEAD = 3

_Tokens = npt.NDArray[np.unsignedinteger]

# Set once in each worker process, so that the model is loaded once and not per batch.
_worker_tokenizer: Tokenizer | None = None


def encode_document(tokenizer: Tokenizer, text: str) -> _Tokens:
    """Return BOS, the ids of the text, EOS: (seq,) in the type they have on disk."""
    dtype = token_dtype(tokenizer.vocab_size)
    pieces = [np.array(ids, dtype=dtype) for ids in tokenizer.encode_pieces(text)]
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=dtype)
    return np.concatenate([bos, *pieces, eos])


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Document, _Tokens]]:
    """Yield every document with its ids, in the order of `documents`.

    Holds a few batches of about half a megabyte of text per worker, or one longer document.

    Args:
        documents: read only as far ahead as the workers need.
        tokenizer: loaded again by each worker from its path.
        workers: number of processes; 1 means this one.
    """
    if workers == 1:
        for document in documents:
            yield document, encode_document(tokenizer, document.text)
        return
    with ProcessPoolExecutor(
        max_workers=workers,
        # A forked child would inherit the threads' locks of a caller that has imported torch.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_load_tokenizer,
        initargs=(tokenizer.path,),
    ) as pool:
        running: deque[tuple[list[Document], Future[list[_Tokens]]]] = deque()
        for batch in _batches(documents):
            running.append((batch, pool.submit(_encode_batch, [d.text for d in batch])))
            if len(running) >= _BATCHES_AHEAD * workers:
                yield from _finish(running)
        while running:
            yield from _finish(running)


def _finish(
    running: deque[tuple[list[Document], Future[list[_Tokens]]]],
) -> Iterator[tuple[Document, _Tokens]]:
    """Wait for the oldest batch."""
    batch, encoded = running.popleft()
    yield from zip(batch, encoded.result(), strict=True)


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


def _load_tokenizer(path: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(path)


def _encode_batch(texts: list[str]) -> list[_Tokens]:
    assert _worker_tokenizer is not None
    return [encode_document(_worker_tokenizer, text) for text in texts]
