import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import sentencepiece

from data.encoding import encode_documents
from data.row_layout import Document
from data.tokenizer import Tokenizer


def test_documents_come_back_in_order_as_bos_text_eos(
    tokenizer_path: Path, documents: list[str]
) -> None:
    texts = [text * 300 for text in documents[:20]]  # Several batches of half a megabyte.
    corpus = [Document(str(n), text) for n, text in enumerate(texts)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    expected = [[1, *processor.encode(text), 2] for text in texts]
    for workers in (1, 2):
        encoded = list(encode_documents(corpus, Tokenizer(tokenizer_path), workers))
        assert [document for document, _ in encoded] == corpus
        assert [tokens.tolist() for _, tokens in encoded] == expected
        assert {tokens.dtype for _, tokens in encoded} == {np.dtype("<u2")}


def test_reading_stays_a_few_batches_ahead(tokenizer_path: Path) -> None:
    read = 0

    def corpus():
        nonlocal read
        for read in range(1, 41):
            yield Document(str(read), "x\n" * 250_000)

    encoded = encode_documents(corpus(), Tokenizer(tokenizer_path), workers=2)
    next(encoded)
    assert read == 6
    # A terminal or SLURM signals them all; what becomes of the work is for the parent to decide.
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert len([next(encoded) for _ in range(4)]) == 4
    encoded.close()
    assert not multiprocessing.active_children()
