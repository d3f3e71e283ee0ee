"""50 clients at once for a minute: none is lost, and none gets the text of another."""

import json
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.inference.conftest import WORDS
from tests.inference.serving.server_process import ServerProcess

openai = pytest.importorskip("openai")
CLIENTS, SECONDS = 50, 60.0
BAD = (
    {"prompt": []},
    {"prompt": "a", "temperature": -1},
    {"prompt": [10**9]},
    {"prompt": "a", "max_tokens": 10**9},
    {"prompt": "a", "strategy": "nothing"},
    {"prompt": "a", "logprobs": 5},
)
PROMPTS = [f"{one} {other}" for one in WORDS[:5] for other in WORDS[5:9]]
STRATEGIES = (None, None, None, "autoregressive", "dynamic:d=4", "self_speculative:E=1:d=2")


@pytest.fixture(scope="module")
def busy_server(run_folder):
    options = ("--batch_size", "8", "--max_queue", "60", "--strategy", "self_speculative:E=2")
    process = ServerProcess(run_folder, *options)
    yield process
    process.close()


class Client:
    """One of the clients, whose requests are drawn from its number."""

    def __init__(self, number, server, plain):
        self.draw, self.server, self.plain = random.Random(number), server, plain
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        self.done = dict.fromkeys(("whole", "stream", "left", "bad", "stop"), 0)

    def run(self, until):
        while time.monotonic() < until:
            kind = self.draw.choice(["whole", "whole", "stream", "stream", "left", "bad", "stop"])
            getattr(self, kind)()
            self.done[kind] += 1
        return self.done

    def asked(self):
        """Return a request and the text that it must get."""
        prompt, max_tokens = self.draw.choice(PROMPTS), self.draw.choice([3, 10, 25])
        settings = {"temperature": 0.0}
        if self.draw.random() < 0.5:
            settings = {"temperature": 1.0, "top_p": 0.9, "seed": self.draw.randrange(6)}
        strategy = self.draw.choice(STRATEGIES)
        extra = {} if strategy is None else {"extra_body": {"strategy": strategy}}
        request = {"model": "run", "prompt": prompt, "max_tokens": max_tokens, **settings, **extra}
        return request, self.plain(prompt, max_tokens, **settings)

    def whole(self):
        request, expected = self.asked()
        answer = self.openai.completions.create(**request)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason in ("length", "stop")

    def stream(self):
        request, expected = self.asked()
        parts = [part.choices[0] for part in self.openai.completions.create(**request, stream=True)]
        assert "".join(part.text for part in parts) == expected
        assert sum(part.finish_reason is not None for part in parts) == 1

    def left(self):
        request, expected = self.asked()
        with self.openai.completions.create(**request, stream=True) as stream:
            assert expected.startswith(next(stream).choices[0].text)

    def stop(self):
        request, expected = self.asked()
        middle = expected[len(expected) // 2 :][:3] or "none"
        answer = self.openai.completions.create(**request, stop=middle)
        assert answer.choices[0].text == expected.partition(middle)[0]

    def bad(self):
        body = json.dumps(self.draw.choice(BAD)).encode()
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions", body, {"content-type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 400
        assert "\n" not in json.loads(refused.value.read())["error"]["message"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_50_clients_for_a_minute_get_what_plain_decoding_gives(busy_server, plain):
    lock = threading.Lock()

    def expected(*arguments, **settings):
        with lock:
            return plain(*arguments, **settings)

    clients = [Client(number, busy_server, expected) for number in range(CLIENTS)]
    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = [*pool.map(lambda client: client.run(until), clients)]
    total = {kind: sum(each[kind] for each in done) for kind in done[0]}
    print(total)
    assert min(sum(each.values()) for each in done) > 0
    assert min(total.values()) > 0
    with urllib.request.urlopen(f"{busy_server.url}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
    assert lines['skipstone_texts_total{ended="failed"}'] == "0"
    ended = sum(int(lines[name]) for name in lines if name.startswith("skipstone_texts_total"))
    running = sum(int(lines[f"skipstone_requests_{how}"]) for how in ("running", "waiting"))
    assert ended + running == total["whole"] + total["stream"] + total["left"] + total["stop"]
    busy_server.signal()
    status, errors = busy_server.wait()
    assert (status, "Traceback" in errors) == (0, False), errors
