"""Text is cut as if the whole of it were known, and sent only when it is certain."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.engine.generation import Emission
from inference.serving.reply import Reply


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def rounds_of(ids, sizes):
    while ids:
        n = next(sizes)
        now, ids = ids[:n], ids[n:]
        yield Emission(0, now, len(now) - 1, len(now))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab\u00e9\U0001f600", min_size=1, max_size=20),
    stops=st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=1),
    cut=st.integers(1, 60),
)
def test_chunks_are_the_text_up_to_the_first_stop_text(text, stops, sizes, cut):
    ids = [*text.encode()][:cut]
    whole = bytes(ids).decode(errors="replace")
    # The first stop text that is complete ends it, though a longer one may have begun before.
    ends = [
        min(at)
        for n in range(len(whole) + 1)
        if (at := [whole[:n].find(stop) for stop in stops if stop in whole[:n]])
    ]
    expected = whole[: ends[0]] if ends else whole
    reply = Reply(Letters(), [], limit=len(ids), stop=stops)
    chunks = []
    for emission in rounds_of(ids, iter(sizes * 60)):
        chunks.append("".join(span.text for span in reply.push(emission)))
        assert expected.startswith("".join(chunks))
        if reply.ending:
            break
    assert "".join(chunks) == expected
    assert reply.ending == ("stop" if ends else "length")
    if not stops:
        assert reply.tokens == len(ids)


def test_text_is_sent_as_soon_as_it_is_certain():
    reply = Reply(Letters(), [], limit=9, stop=("abc",))
    sent = [
        "".join(span.text for span in reply.push(Emission(0, [ord(letter)], 0, 0)))
        for letter in "xababz"
    ]
    assert sent == ["x", "", "", "ab", "", "abz"]


@pytest.mark.parametrize("at", [0, 3])
def test_a_stop_token_has_no_text_and_torn_bytes_come_at_the_end(at):
    reply = Reply(Letters(), [], limit=9, stop_tokens=(0,))
    ids = [*b"abc"][:at] + [0xC3, 0]
    spans = reply.push(Emission(0, ids, 0, 0))
    assert "".join(span.text for span in spans).startswith("abc"[:at] + "\ufffd")
    assert (reply.ending, reply.tokens) == ("stop", at + 2)
