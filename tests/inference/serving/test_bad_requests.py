"""Whatever a stranger sends is refused in one line, or closed; nothing of it reaches the model."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import inference
from inference.engine.open_batch import OpenBatch
from inference.engine.row_draws import RowDraw
from inference.engine.sampling import Sampling
from inference.serving.job import Job, Text
from inference.strategies.registry import parse_strategy

pytest.importorskip("fastapi")
testclient = pytest.importorskip("starlette.testclient")


@pytest.fixture(scope="module")
def served(run_folder):
    """What a server of a thread that does not run serves: requests stay in the queue."""
    from inference.serving.app import Served
    from inference.serving.named_strategies import NamedStrategies
    from inference.serving.scheduler import Scheduler

    run = inference.load(run_folder).run
    own = parse_strategy("autoregressive")
    scheduler = Scheduler(
        lambda strategy: OpenBatch(run.model, lambda n: own, rows=2, slots=64),
        rows=2,
        max_queue=3,
        on_death=lambda: None,
    )
    strategies = NamedStrategies(run, None, 64)
    return Served(run=run, name="run", slots=64, strategies=strategies, scheduler=scheduler)


def open_client(served, key=None, host="localhost"):
    from inference.serving.app import build_app
    from inference.serving.guard import LOOPBACK, Guard

    app = Guard(build_app(served), key, LOOPBACK, served.scheduler.metrics.refused)
    return testclient.TestClient(app, base_url=f"http://{host}:8000")


@pytest.fixture(scope="module")
def client(served):
    return open_client(served)


def post(client, body, kind="application/json", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        "/v1/completions", content=content, headers={"content-type": kind, **headers}
    )


def check(answer, status, *words):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    for word in words:
        assert word in error["message"], error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("prompt", value) for value in (None, 5, [], [[]], ["a", 5], [[1], "a"], [1.5], [True])],
        *[("prompt", value) for value in ([-1], [10**9], [10**40], "x" * 5000, "\ud800", {"a": 1})],
        *[("max_tokens", value) for value in (0, -1, 10**9, 1.5, "5", True, 64)],
        *[("temperature", value) for value in (-1, 2.5, 1e-9, 10**400, "hot", True, [])],
        *[("top_p", value) for value in (0, -1, 1.5, "x")],
        *[("top_k", value) for value in (0, -1, 2**80, 1.5)],
        *[("seed", value) for value in (-1, 2**64, 1.5, "x")],
        *[("n", value) for value in (0, -1, 6, 10**12)],
        *[("stop", value) for value in (5, [5], [""], "", ["x"] * 17, "x" * 257, {"a": 1})],
        *[("stream", value) for value in (1, "yes")],
        *[("stream_options", value) for value in ({"include_usage": True}, 5)],
        ("best_of", 2),
        ("echo", "yes"),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"50256": -100}),
        ("logprobs", 1),
        ("presence_penalty", 1),
        ("suffix", "end"),
        ("user", 5),
        *[("strategy", value) for value in ("", "nothing", "early_exit:E=99", "calm:x", "é" * 900)],
        *[("strategy", f"self_speculative:{how}") for how in ("d=0", "d=9999", "branch=50:d=60")],
    ],
)
def test_a_wrong_value_is_refused_by_name(client, field, value):
    error = check(post(client, {"prompt": "a", field: value}), 400, f"{field}: ")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field


@pytest.mark.parametrize(
    "strategy",
    [
        "speculative:draft=/etc",
        "calm:confidence=gate:gate=/etc/passwd",
        "self_speculative:draft_vocab=5:token_counts=/dev/zero",
    ],
)
def test_a_request_names_no_files(client, strategy):
    check(post(client, {"prompt": "a", "strategy": strategy}), 400, "cannot name files")


@pytest.mark.parametrize("field", ["max_token", "messages", "x" * 9999, "\ud800", ""])
def test_an_unknown_field_is_refused(client, field):
    check(post(client, {"prompt": "a", field: 1}), 400, "field: ", "does not exist")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"prompt": "a", "prompt": "b"}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'{"temperature": NaN}'),
        *(b'{"temperature": Infinity}', b'{"temperature": 1e999}', b"\0" * 100),
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json_object_is_refused(client, body):
    error = check(post(client, body), 400, "body: ")
    assert "sys." not in error["message"]  # Python's own remedies are none for a client


def test_a_body_is_bounded_before_it_is_parsed(client):
    check(post(client, b" " * (2**20 + 1)), 413, "body: ")
    for length in ("9" * 9, "9" * 5000):
        check(post(client, b"{}", **{"content-length": length}), 413)


def test_a_body_that_does_not_come_is_waited_for_in_vain(monkeypatch):
    from inference.serving import guard

    async def receive():
        await asyncio.Event().wait()

    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    request = guard.Request(scope, receive)
    with ThreadPoolExecutor(1) as pool:  # this thread may have the event loop of a browser
        waiting = pool.submit(asyncio.run, guard.read_body(request))
        assert waiting.exception(timeout=30).status == 408


def test_a_page_of_another_site_can_send_nothing(client, served):
    """A form or a script there sends these types unasked, and may name the host as it likes."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        check(post(client, {"prompt": "a"}, kind), 415, "content-type: ")
    for host in ("evil.example", "localhost.evil.example", "0.0.0.0"):
        check(open_client(served, host=host).get("/v1/models"), 421, "host: ")
    answer = client.options("/v1/completions", headers={"origin": "http://evil.example"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_key_is_asked_for(served):
    client = open_client(served, key="secret", host="any.example")
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        for given in (None, "Bearer", "Bearer wrong", "Basic secret", "Bearer secre\u00e9"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            answer = client.get(path, headers=headers)
            assert check(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).is_success
    assert client.get("/").is_success
    assert client.get("/health").is_success


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[("GET", path, 404) for path in ("/v1", "/docs", "/openapi.json", "/..%2f", "/\u00e9")],
        *[("GET", "/v1/completions", 405), ("POST", "/", 405), ("DELETE", "/v1/models", 405)],
        ("POST", "/v1/chat/completions", 404),
    ],
)
def test_other_paths_and_methods(client, method, path, status):
    check(client.request(method, path), status)


def test_head_has_no_body(client):
    for path in ("/", "/health", "/metrics", "/v1/models"):
        answer = client.head(path)
        assert answer.is_success


def test_refusals_are_counted_wherever_they_come_from(served):
    client, counts = open_client(served, key="secret", host="any.example"), served.scheduler.metrics
    before = counts.refused[401], counts.refused[404]
    client.get("/v1/models")
    client.get("/v1/nothing", headers={"authorization": "Bearer secret"})
    assert (counts.refused[401], counts.refused[404]) == (before[0] + 1, before[1] + 1)


def test_a_model_is_found_by_its_name(client):
    [listed] = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/run").json() == listed
    assert check(client.get("/v1/models/a/b"), 404, "a/b", "run")["code"] == "model_not_found"


def test_another_model_is_not_found(client):
    error = check(post(client, {"prompt": "a", "model": "gpt-4"}), 404, "model: ")
    assert error["code"] == "model_not_found"


def test_a_full_queue_and_a_server_that_ends_refuse(served):
    client, scheduler = open_client(served), served.scheduler
    draw = RowDraw(Sampling(), 0)
    job = Job([Text([1], 5, draw, None)] * 4, None, print)
    scheduler.submit(job)
    answer = post(client, {"prompt": ["a", "b"]})
    assert check(answer, 429, "queue")["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) > 0
    assert "skipstone_requests_waiting 4" in client.get("/metrics").text
    assert 'skipstone_refused_total{status="429"} 1' in client.get("/metrics").text
    scheduler.leave(job)
    scheduler.drain()
    answer = post(client, {"prompt": "a"})
    check(answer, 503, "shutting down")
    assert int(answer.headers["retry-after"]) > 0
    assert client.get("/health").status_code == 503
    scheduler._refusing = ""
    scheduler._waiting.clear()


def test_no_field_is_read_and_ignored(client):
    """Every field of the official client's call is used, or refused unless it asks for nothing."""
    import inspect

    from openai.resources.completions import Completions

    from inference.serving import completion_request

    taken = inspect.signature(Completions.create).parameters
    ours = {*completion_request._USED, *completion_request._UNUSED}
    assert {*taken} - ours == {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    nothing = {name: values[-1] for name, values in completion_request._UNUSED.items() if values}
    read = partial(completion_request.read_request)
    asked = read(json.dumps({"prompt": "a", **nothing, "logprobs": None}).encode())
    assert (asked.max_tokens, asked.n, asked.sampling.temperature) == (16, 1, 1.0)
    assert not math.isnan(asked.sampling.temperature)
