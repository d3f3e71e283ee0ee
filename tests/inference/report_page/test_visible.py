"""No text of others acts on the page or hides on it."""

import unicodedata
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import Tokenizer
from inference.report_page.visible import TokenTexts, safe, visible, with_signs

HOSTILE = (
    "</script><script>alert(1)</script>\"'`&amp;\u202e\u2066\x1b[31m\x00\u2028\ud800\u0301\u0301"
)


@given(st.text(st.characters()) | st.just(HOSTILE))
def test_nothing_invisible_is_left(text):
    for shown in (visible(text), with_signs(text), unescape(safe(text))):
        kinds = {unicodedata.category(char) for char in shown}
        assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
        shown.encode()


@given(st.text(st.characters(), max_size=40) | st.just(HOSTILE))
def test_escaped_text_is_one_piece_of_text_in_an_element_and_in_an_attribute(text):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

        def handle_data(self, data):
            found.append(data)

    reader = Reader()
    reader.feed(f'<p title="{safe(text)}">{safe(text)}</p>')
    reader.close()
    assert found[0] == ("p", {"title": visible(text)})
    assert "".join(found[1:]) == visible(text)


def test_marks_without_a_letter_get_a_circle_and_towers_of_marks_are_cut():
    assert visible("\u0301a") == "\u25cc\u0301a"
    assert visible("a" + "\u0301" * 50) == "a" + "\u0301" * 4


@pytest.mark.parametrize(
    ("text", "shown"), [(" a", "\u2423a"), ("a\n", "a\u21b5"), (" " * 12, "\u2423\u00d712")]
)
def test_white_space_has_signs(text, shown):
    assert with_signs(text) == shown


def test_kept_controls_stay_and_long_text_is_cut():
    assert visible("a\n\tb\r", keep="\n\t") == "a\n\tb\\x0d"
    assert safe("x" * 500) == "x" * 300 + "\u2026"


def test_tokens_have_their_text_within_a_text_and_half_characters_a_name(tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    texts = TokenTexts(tokenizer)
    half = tokenizer.encode("\U0001f600")
    assert len(half) > 1
    assert all(texts[token].startswith("<") for token in half[-3:])
    assert texts[tokenizer.eos_id].startswith("<")
    for token in tokenizer.encode("the cat sat"):
        assert texts[token] in "the cat sat"
