"""The grammar of requests: what it makes is sound, seeded, and split without a request in both."""

import json
import re
import sys
from itertools import islice

import pytest

from data import semantic_parsing
from data.semantic_parsing import INTENTS, NESTED, SLOTS, Options, examples, write

MADE = list(islice(examples(0), 2000))
NAMES = {intent.name for intent in (*INTENTS, *(i for few in NESTED.values() for i in few))}


def read(words):
    """Read one tree off the front of `words`; return its words."""
    kind, name = re.fullmatch(r"\[(IN|SL):(\w+)", words.pop(0)).groups()
    assert name in (NAMES if kind == "IN" else SLOTS)
    spoken = []
    while words[0] != "]":
        if words[0].startswith("["):
            assert words[0][1:3] != kind, "an intent holds slots, a slot an intent"
            spoken += read(words)
        else:
            assert kind == "SL", "a word that fills no slot is left out"
            spoken.append(words.pop(0))
    words.pop(0)
    return spoken


@pytest.mark.parametrize("number", range(0, 2000, 40))
def test_a_parse_is_one_tree_of_the_utterances_words_in_their_order(number):
    utterance, parse = MADE[number]
    words = parse.split()
    spoken, heard = read(words), iter(utterance.split())
    assert not words
    assert all(word in heard for word in spoken)


def test_all_intents_and_depths_come_and_no_request_comes_twice():
    assert len({utterance for utterance, _ in MADE}) == len(MADE)
    assert {re.match(r"\[IN:(\w+)", parse)[1] for _, parse in MADE} == {i.name for i in INTENTS}
    assert 0.05 < sum(parse.count("[IN:") > 1 for _, parse in MADE) / len(MADE) < 0.6


def test_the_seed_alone_decides():
    assert list(islice(examples(0), 50)) == MADE[:50]
    assert list(islice(examples(1), 50)) != MADE[:50]


def test_both_files_are_written_and_share_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["--output", str(tmp_path / "a"), "--examples", "300", "--held_out", "40"]
    monkeypatch.setattr(sys, "argv", ["semantic_parsing", *arguments])
    semantic_parsing.main()
    files = {name: tmp_path / "a" / f"{name}.jsonl" for name in ("train", "test")}
    rows = {name: [*map(json.loads, path.open())] for name, path in files.items()}
    assert [len(rows[name]) for name in ("train", "test")] == [300, 40]
    assert not {row["utterance"] for row in rows["train"]} & {r["utterance"] for r in rows["test"]}
    write(Options(output=tmp_path / "b", examples=300, held_out=40))
    assert (tmp_path / "b" / "test.jsonl").read_bytes() == files["test"].read_bytes()
    monkeypatch.setattr(sys, "argv", ["semantic_parsing", *arguments[:-1], "0"])
    with pytest.raises(SystemExit, match="2"):
        semantic_parsing.main()
    assert capsys.readouterr().err == "error: examples 300, held_out 0: give 1 to 50000\n"
