"""One server process for the tests of a session, and what its model says without a server."""

from functools import cache

import pytest

import inference
from inference.engine.open_batch import OpenBatch
from inference.engine.row_draws import RowDraw
from inference.engine.sampling import Sampling
from inference.strategies.registry import parse_strategy
from tests.inference.serving.server_process import ServerProcess


@pytest.fixture(scope="session")
def server(run_folder):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    options = ("--batch_size", "4", "--max_queue", "20", "--strategy", "self_speculative:E=2")
    process = ServerProcess(run_folder, *options)
    yield process
    process.close()


@pytest.fixture(scope="session")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def plain(run_folder):
    """Return plain(prompt, max_tokens, temperature=0, top_p=1, seed=0) -> the text, alone."""
    run = inference.load(run_folder).run

    @cache
    def text(prompt, max_tokens, *, temperature=0.0, top_p=1.0, seed=0):
        strategy = parse_strategy("autoregressive")
        batch = OpenBatch(
            run.model, lambda n: strategy, rows=1, slots=64, stop_tokens=run.stop_tokens
        )
        ids = [run.tokenizer.bos_id, *run.tokenizer.encode(prompt)]
        draw = RowDraw(Sampling(temperature=temperature, top_p=top_p), seed)
        batch.join(0, ids, limit=max_tokens, draw=draw)
        tokens = []
        while len(batch):
            tokens += batch.round()[0].tokens
        return run.tokenizer.decode(ids + tokens)[len(run.tokenizer.decode(ids)) :]

    return text
