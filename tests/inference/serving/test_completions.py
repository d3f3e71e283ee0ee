"""The server answers the official client with what the model says, whoever else asks."""

import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.inference.conftest import WORDS

openai = pytest.importorskip("openai")


def sampled(i):
    return {"temperature": 1.0 if i % 2 else 0.7, "top_p": 0.8 if i % 3 else 1.0, "seed": i}


def ask(client, prompt, max_tokens=12, **options):
    return client.completions.create(
        model="run", prompt=prompt, max_tokens=max_tokens, **({"temperature": 0} | options)
    )


def test_greedy_text_usage_and_finish_reason(client, plain):
    answer = ask(client, "the cat sat")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (plain("the cat sat", 12), "length")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == "run"
    assert choice.skipstone["strategy"] == "self_speculative:E=2"
    assert [model.id for model in client.models.list()] == ["run"]


def test_chunks_join_to_the_text_and_name_the_source_of_each_token(client, plain):
    chunks = [
        *ask(client, "a moon", 20, stream=True, stream_options={"include_usage": True}, echo=True)
    ]
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == "a moon" + plain("a moon", 20)
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + [
        "length"
    ]
    tokens = [token for part in parts for token in part.skipstone["tokens"]]
    assert "".join(token["text"] for token in tokens) == plain("a moon", 20)
    assert {token["source"] for token in tokens} <= {"accepted", "corrected", "plain"}
    assert (last.choices, last.usage.completion_tokens) == ([], 20)
    end = parts[-1].choices[0].skipstone
    assert end["accepted"] == sum(token["source"] == "accepted" for token in tokens)
    assert end["tokens"] == len(tokens) == 20


def test_a_request_has_its_text_alone_and_among_20_others(client, plain):
    draw = random.Random(4)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(21)]
    options = [sampled(i) if i % 2 else {"temperature": 0} for i in range(21)]
    strategies = [None, "autoregressive", "dynamic:d=3", "self_speculative:E=1:branch=2"]

    def one(i):
        strategy = strategies[i % 4]
        extra = {"extra_body": {"strategy": strategy}} if strategy else {}
        return ask(client, prompts[i], **options[i], **extra).choices[0].text

    with ThreadPoolExecutor(21) as pool:
        together = [*pool.map(one, range(21))]
    assert together == [
        plain(prompt, 12, **given) for prompt, given in zip(prompts, options, strict=True)
    ]
    assert one(3) == together[3]
    assert len({*together}) > 15


def test_lists_of_prompts_samples_and_token_ids(client, plain):
    answer = ask(client, ["the hill", "a mat"], n=2, temperature=1.0, seed=7)
    expected = [
        plain(prompt, 12, temperature=1.0, seed=seed)
        for prompt in ("the hill", "a mat")
        for seed in (7, 8)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [1, 40, 41]
    by_ids = ask(client, [ids, ids])
    assert by_ids.choices[0].text == by_ids.choices[1].text
    assert by_ids.usage.prompt_tokens == 6


def test_a_stop_text_ends_a_text_and_is_never_sent(client, plain):
    whole = plain("quiet", 30)
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    answer = ask(client, "quiet", 30, stop=["never", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = [*ask(client, "quiet", 30, stop=stop, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_without_a_seed_texts_differ_and_the_seed_is_named(client):
    first, second = (ask(client, "the", 20, temperature=1.0).choices[0] for _ in range(2))
    assert first.text != second.text
    seed = first.skipstone["seed"]
    assert ask(client, "the", 20, temperature=1.0, seed=seed).choices[0].text == first.text


def test_metrics_are_those_of_prometheus(client, server):
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    kinds = {}
    values = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    assert kinds["skipstone_generation_tokens_total"] == "counter"
    assert kinds["skipstone_requests_waiting"] == "gauge"
    assert kinds["skipstone_first_text_seconds"] == "histogram"
    assert values["skipstone_generation_tokens_total"] > 0
    assert values["skipstone_accepted_tokens_total"] <= values["skipstone_drafted_tokens_total"]
    bucket = values['skipstone_text_seconds_bucket{le="+Inf"}']
    assert bucket == values["skipstone_text_seconds_count"] > 0


def running(server):
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    names = ("skipstone_requests_running ", "skipstone_requests_waiting ")
    return sum(int(line.split()[1]) for line in lines if line.startswith(names))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(server, stream):
    body = json.dumps(
        {"prompt": ["the cat"] * 20, "max_tokens": 55, "stream": stream, "temperature": 0}
    )
    request = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    )
    with server.connect() as connection:
        connection.sendall(request.encode())
        if stream:
            assert b"200 OK" in connection.recv(100)
        while not running(server):
            time.sleep(0.01)
    for _ in range(500):
        if not running(server):
            break
        time.sleep(0.01)
    assert not running(server)
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        assert b'skipstone_texts_total{ended="left"}' in answer.read()
