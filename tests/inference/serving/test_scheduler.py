"""The decoding thread outlives what goes wrong in it, or ends the server loudly."""

import queue
import threading

import pytest

from inference.engine.open_batch import OpenBatch
from inference.engine.row_draws import RowDraw
from inference.engine.sampling import Sampling
from inference.serving.job import Job, Text
from inference.serving.reply import Reply
from inference.serving.request_error import RequestError
from inference.serving.scheduler import Scheduler
from inference.strategies.registry import parse_strategy
from tests.inference.every_strategy import make_model


class Numbers:
    """A tokenizer whose text of a token is its number."""

    def decode(self, ids):
        return "".join(f"{token}," for token in ids)


@pytest.fixture(scope="module")
def model():
    return make_model(n_layers=3)


class Decoding:
    """A scheduler of two rows, and requests to it."""

    def __init__(self, model):
        self.opened, self.died = [], threading.Event()
        self.model = model
        self.scheduler = Scheduler(self.open_batch, rows=2, max_queue=8, on_death=self.died.set)
        self.scheduler.start()

    def open_batch(self, strategy):
        kind = strategy or parse_strategy("autoregressive")
        self.opened.append(OpenBatch(self.model, lambda n: kind, rows=2, slots=90))
        return self.opened[-1]

    def submit(self, prompt=(5, 6), limit=6, strategy=None, texts=1):
        events = queue.Queue()
        made = [
            Text(prompt, limit, RowDraw(Sampling(), 0), Reply(Numbers(), prompt, limit=limit))
            for _ in range(texts)
        ]
        job = Job(made, strategy and parse_strategy(strategy).with_defaults(3), events.put)
        self.scheduler.submit(job)
        return job, events

    def text(self, events, texts=1):
        """Return the first text of a request, or what it was refused with."""
        found = [""] * texts
        while texts:
            event = events.get(timeout=30)
            if isinstance(event, RequestError):
                return event
            found[event.index] += "".join(span.text for span in event.spans)
            texts -= event.ending is not None
        return found[0]


@pytest.fixture
def decoding(model):
    return Decoding(model)


def test_a_failing_round_ends_its_requests_alone(decoding, monkeypatch, caplog):
    expected = decoding.text(decoding.submit()[1])
    other = parse_strategy("early_exit:E=2")

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoding.opened[0], "round", fail)
    _, failing = decoding.submit(texts=4)
    _, fine = decoding.submit(strategy="early_exit:E=2")
    refusal = decoding.text(failing)
    assert (refusal.status, refusal.message) == (
        500,
        "decoding failed (RuntimeError), try again",
    )
    assert isinstance(decoding.text(fine), str)
    assert decoding.text(decoding.submit()[1]) == expected
    assert "out of memory" in caplog.text
    assert other.name in {batch.strategy.name for batch in decoding.opened}
    assert not decoding.died.is_set()
    assert decoding.scheduler.idle


def test_the_end_of_the_thread_ends_the_server(decoding, monkeypatch, caplog):
    def fail():
        raise RuntimeError("lost")

    monkeypatch.setattr(decoding.scheduler, "_drop_those_that_left", fail)
    _, events = decoding.submit()
    assert decoding.text(events).status == 500
    assert decoding.died.wait(30)
    with pytest.raises(RequestError, match="thread has ended") as refused:
        decoding.submit()
    assert refused.value.status == 503
    assert "lost" in caplog.text


def test_batches_of_other_strategies_are_few_and_all_are_served(decoding):
    names = [f"self_speculative:E={E}:d={d}" for E in (1, 2) for d in (1, 2, 3, 4)]
    waiting = [decoding.submit(strategy=name)[1] for name in names]
    expected = decoding.text(decoding.submit()[1])
    assert [decoding.text(events) for events in waiting] == [expected] * len(names)
    assert len(decoding.scheduler._groups) <= 3


def test_settings_that_only_the_model_shows_to_be_wrong_are_refused(decoding):
    refusal = decoding.text(decoding.submit(strategy="self_speculative:E=1:branch=62")[1])
    assert (refusal.status, refusal.message[:10]) == (400, "strategy: ")
    assert isinstance(decoding.text(decoding.submit()[1]), str)


def test_a_request_that_left_frees_its_rows_and_its_place_in_the_queue(decoding):
    long, events = decoding.submit(limit=80, texts=6)
    events.get(timeout=30)
    decoding.scheduler.leave(long)
    assert isinstance(decoding.text(decoding.submit()[1]), str)
    assert decoding.scheduler.idle
    assert +decoding.scheduler.metrics.ended == {"left": 6, "length": 1}
