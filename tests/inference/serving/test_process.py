"""The process: raw connections, the key, and its end by signals."""

import signal
import socket
import threading
import time

import pytest

from inference.serving import http_server
from tests.inference.serving.server_process import ServerProcess

openai = pytest.importorskip("openai")
KEY = "a-key-of-clients"


def head(*lines, path="/v1/completions"):
    fixed = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    return "".join(f"{line}\r\n" for line in [*fixed, *lines, ""]).encode()


def talk(server, *parts):
    """Send bytes as long as the server takes them; return what it answers until it closes."""
    with server.connect() as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:
            pass
        answer = b""
        try:
            while (part := connection.recv(65536)) and b"\r\n\r\n" not in answer:
                answer += part
        except OSError:
            pass
        return answer


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"\0\xff\x16\x03\x01 nonsense\r\n\r\n"], 400),
        ([b"GET / HTTP/1.1\r\n\r\n"], 400),  # no host
        ([b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 2**17 + b"\r\n\r\n"], 400),
        ([head("content-length: nonsense")], 400),
        ([head("content-length: -5")], 400),
        ([head("content-length: 9999999999")], 413),
        ([head("transfer-encoding: chunked"), *[b"10000\r\n" + b" " * 2**16 + b"\r\n"] * 99], 413),
        ([head("content-length: 9"), b'{"prompt"'], 400),
    ],
    ids=["bytes", "no host", "long header", "words", "negative", "huge", "endless", "cut off"],
)
def test_raw_bytes_are_refused_and_the_server_goes_on(server, parts, status):
    answer = talk(server, *parts)
    # A connection may be reset while the client still sends, before the answer is read.
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) or not answer
    assert b"Traceback" not in answer
    health = talk(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert health.startswith(b"HTTP/1.1 200 ")


def test_a_connection_that_sends_no_request_is_closed(monkeypatch):
    """Its clock is set when the connection begins and when an answer ends."""
    calls = []

    class Loop:
        def call_later(self, seconds, call):
            calls.append((seconds, call))

    class Transport:
        closed = False

        def is_closing(self):
            return self.closed

        def abort(self):
            self.closed = True

    protocol = http_server.BoundedProtocol.__new__(http_server.BoundedProtocol)
    protocol.loop, protocol.transport, protocol.cycle = Loop(), Transport(), None
    protocol._expect_request(15.0)
    protocol.cycle = object()  # a request came
    calls[0][1]()
    assert not protocol.transport.closed
    protocol._expect_request(75.0)
    calls[1][1]()
    assert protocol.transport.closed
    assert [seconds for seconds, _ in calls] == [15.0, 75.0]


def ask_until_refused(client, **options):
    while True:  # the signal may not have arrived yet
        client.completions.create(prompt="a", **options)


def test_a_signal_ends_the_server_after_what_runs(run_folder):
    """A key in the environment; a stream that runs is finished, a new request refused."""
    server = ServerProcess(run_folder, "--batch_size", "1", environment={"SKIPSTONE_API_KEY": KEY})
    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        [model] = client.models.list()
        asked = {"model": model.id, "max_tokens": 80, "temperature": 0}
        stream = client.completions.create(prompt=["the cat"] * 8, stream=True, **asked)
        first = next(stream)
        server.signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as refused:
            ask_until_refused(client, **asked | {"max_tokens": 1})
        assert refused.value.status_code == 503
        parts = [first, *stream]
        assert sum(part.choices[0].finish_reason is not None for part in parts) == 8
        assert len({part.choices[0].index for part in parts}) == 8
        status, errors = server.wait()
    finally:
        server.close()
    assert status == 0, errors
    assert "Traceback" not in errors


@pytest.fixture
def bare_server(monkeypatch):
    """A server of nothing, whose scheduler is never idle."""

    class Scheduler:
        idle, drained = False, False

        def drain(self):
            self.drained = True

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(http_server.os, "_exit", end)
    return http_server.Server(lambda scope, receive, send: None, Scheduler())


def tick(server):
    with pytest.raises(StopIteration) as ended:  # it waits for nothing
        server.on_tick(1).send(None)
    return ended.value.value


def test_a_second_signal_ends_at_once(bare_server):
    bare_server.handle_exit(signal.SIGTERM, None)
    assert bare_server._scheduler.drained
    assert not tick(bare_server)
    with pytest.raises(SystemExit) as ended:
        bare_server.handle_exit(signal.SIGINT, None)
    assert ended.value.code == 128 + signal.SIGINT


def test_the_end_of_the_decoding_thread_is_an_error(bare_server, monkeypatch):
    monkeypatch.setattr(bare_server, "run", lambda sockets: None)
    bare_server.die()
    assert tick(bare_server)
    with pytest.raises(SystemExit) as ended:
        bare_server.serve_on(None)
    assert ended.value.code == 1


@pytest.mark.parametrize("host", ["no.such.invalid", "192.0.2.1"])
def test_an_address_that_is_not_here_is_refused_by_name(host):
    with pytest.raises(ValueError, match=f"host: {host}, .*, give another --host"):
        http_server.listen(host, 0)


class _Finished:
    """A scheduler with nothing to do."""

    idle = True

    def drain(self):
        pass


async def _answer_at_length(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(300):
        await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("ends", [True, False], ids=["at the end", "while it runs"])
def test_a_client_that_reads_nothing_is_given_up(monkeypatch, ends):
    monkeypatch.setattr(http_server, "FLUSH_SECONDS" if ends else "UNREAD_SECONDS", 0.2)
    server = http_server.Server(_answer_at_length, _Finished())
    listening = http_server.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_on, args=(listening,))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listening.getsockname())
        thread.start()
        client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        give_up_at = time.monotonic() + 30
        connections = server.server_state.connections
        while not connections and time.monotonic() < give_up_at:
            time.sleep(0.01)
        if not ends:
            while connections and time.monotonic() < give_up_at:
                time.sleep(0.01)
            assert not connections
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        assert not thread.is_alive()
