"""Files and rows of token ids, hostile: one line or success, in bounded time."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from data.faults import Faults
from data.sources.source import Source
from data.token_ids.files import open_token_file
from data.token_ids.rows import read_token_rows
from data.token_ids.splitting import TokenOptions, split_token_files
from data.tokenizer import Tokenizer
from tests.data.test_token_ids import write, write_megatron
from tests.hostile.forgery import MANY, check, damaged, forged

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 2]]


@pytest.mark.parametrize("kind", ["llm.c .bin", "numpy .npy", "megatron uint16", "an index"])
def test_files_of_ids(tmp_path, tokenizer_path, kind):
    tokenizer = Tokenizer(tokenizer_path)
    path = write(tmp_path, "megatron uint16" if kind == "an index" else kind, DOCUMENTS)
    harmed = path.with_suffix(".idx") if kind == "an index" else path

    @MANY
    @given(damaged(harmed.read_bytes()))
    def holds(content):
        harmed.write_bytes(content)
        check(lambda: open_token_file(path, "<u2").read()[:3], "a.")
        check(lambda: split_token_files([str(path)], tokenizer, TokenOptions(), 0.3), "a.")

    holds()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_ids(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rows = {"input_ids": DOCUMENTS[0]}
    if suffix == ".jsonl":
        changed = damaged(json.dumps(rows).encode()) | forged(rows)
    else:
        file = io.BytesIO()
        pq.write_table(pa.table({"input_ids": DOCUMENTS}), file)
        changed = damaged(file.getvalue())

    @MANY
    @given(changed)
    def holds(content):
        path.write_bytes(content)
        source = Source(path, str(path))
        check(lambda: [*read_token_rows(source, "input_ids", Faults())], path.name)

    holds()


def test_an_index_that_claims_many_documents_allocates_none(tmp_path):
    path = tmp_path / "a.bin"
    write_megatron(path, DOCUMENTS, 8, "<u2")
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[18:26] = np.array([2**60], "<i8").tobytes()
    index.write_bytes(content)
    check(lambda: open_token_file(path, "<u2"), "a.idx")
