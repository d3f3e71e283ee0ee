"""Streamed text is the final text, and no character comes in parts."""

import pytest

from data.tokenizer import Tokenizer, train_tokenizer
from inference.text.detokenizer import Detokenizer

TEXT = "a cat \U0001f408 and caf\u00e9 \u65e5\u672c\n\ttab  end"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["the cat sat on a mat and the cat saw a moon " * 20], 280, path)
    return Tokenizer(path)


def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer):
    prompt, ids = [tokenizer.bos_id, *tokenizer.encode("the ")], tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT), "characters outside the corpus were to fall back to bytes"
    stream = Detokenizer(tokenizer, prompt)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == TEXT
    assert stream.finish() == ""
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert pieces.count("") >= 3, "the bytes of an emoji before its last give nothing"


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    torn = tokenizer.encode("\U0001f408")[:-1]
    stream = Detokenizer(tokenizer, [tokenizer.bos_id])
    assert "".join(stream.push(token) for token in torn) == ""
    assert set(stream.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_torn_bytes_in_the_middle_come_with_the_next_character(tokenizer):
    ids = [*tokenizer.encode("\U0001f408")[:-1], *tokenizer.encode("cat")]
    stream = Detokenizer(tokenizer, [tokenizer.bos_id])
    streamed = "".join(stream.push(token) for token in ids) + stream.finish()
    assert streamed == tokenizer.decode(ids)
    assert streamed.endswith("cat")
