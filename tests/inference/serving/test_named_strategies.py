"""A server decodes with what was tuned for as many rows, or with what it is told."""

import json
import shutil

import pytest

import inference
from inference.engine.open_batch import OpenBatch
from inference.engine.row_draws import RowDraw
from inference.engine.sampling import Sampling
from inference.loading.tuned import Tuned, conditions_of, write_tuned
from inference.serving.named_strategies import NamedStrategies
from inference.serving.request_error import RequestError
from inference.strategies.registry import describe, parse_strategy


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory):
    """A run that was tuned for one row and for four."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(run_folder, folder)
    opened = inference.load(folder).run
    for rows, text in ((1, "self_speculative:E=1:d=2"), (4, "dynamic:d=3")):
        conditions = conditions_of(opened, batch_size=rows, quantize=None)
        write_tuned(opened, None, Tuned(strategy=text, conditions=conditions), {})
    return opened


def test_each_number_of_rows_has_what_was_tuned_for_it(run):
    own = NamedStrategies(run, None, 64).own
    batch = OpenBatch(run.model, own, rows=4, slots=64)
    found = {rows: describe(strategy) for rows, strategy in batch._strategies.items()}
    assert found == {1: "self_speculative:E=1:d=2", 2: "autoregressive", 4: "dynamic:d=3"}


def test_what_the_server_is_told_goes_for_all_rows(run):
    strategies = NamedStrategies(run, "early_exit:E=2", 64)
    assert {strategies.own(rows).name for rows in (1, 2, 4)} == {"early_exit"}
    assert strategies.named("early_exit:E=2") is None  # its own
    assert describe(strategies.named("early_exit:E=3")) == "early_exit:E=3"
    with pytest.raises(RequestError, match="did you mean early_exit"):
        strategies.named("early_exits")


def decode(run, strategy):
    """Return the tokens of six texts in two rows, every other one sampled."""
    batch = OpenBatch(run.model, lambda rows: strategy, rows=2, slots=40)
    tokens = {key: [] for key in range(6)}
    waiting = [*tokens]
    while waiting or len(batch):
        if waiting and batch.free:
            key = waiting.pop()
            draw = RowDraw(Sampling(temperature=key % 2), key)
            batch.join(key, [1, 20 + key, 30], limit=9 + key, draw=draw)
        for key, emission in batch.round().items():
            tokens[key] += emission.tokens
    return tokens, batch.counters


@pytest.mark.parametrize("kind", ["speculative", "draft_vocab"])
def test_strategies_of_files_draft_for_texts_that_come_and_go(run, tmp_path, kind):
    counts = tmp_path / "counts.json"
    numbers = [*range(run.model.config.vocab_size)]
    counts.write_text(json.dumps({"counts": numbers, "tokenizer": run.tokenizer.fingerprint}))
    text = {
        "speculative": f"speculative:draft={run.checkpoint}:d=3",
        "draft_vocab": f"self_speculative:E=3:d=3:draft_vocab=200:token_counts={counts}",
    }[kind]
    strategy = NamedStrategies(run, text, 40).own(2)
    tokens, counters = decode(run, strategy)
    assert tokens == decode(run, parse_strategy("autoregressive"))[0]
    # The draft model is the model itself, and sees the same noise.
    assert counters.acceptance_rate == 1.0 if kind == "speculative" else counters.accepted > 0
