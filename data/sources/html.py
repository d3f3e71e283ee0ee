"""HTML pages, a document each: their text, without menus and other parts around it."""

import re
from collections.abc import Iterator

from data.faults import Faults
from data.row_layout import Document, RowLayout, sound_document
from data.sources.lines import TOO_LONG
from data.sources.source import Source
from data.sources.text import is_long, read_whole, refuse_fields

_AROUND = ("nav", "aside", "footer", "body > header")
_MAX_TAGS = 2_000_000
"""Each takes some hundred bytes in memory."""
_MAX_LIST_DEPTH = 100
"""Each line of a list is indented by its depth."""
_LIST = re.compile(rb"<(/?)(?:ul|ol)\b", re.IGNORECASE)


def read_html(source: Source, layout: RowLayout, faults: Faults) -> Iterator[Document | None]:
    """Yield the one document of a page.

    Raises:
        ValueError: the layout asks for fields, or Resiliparse is not installed.
    """
    refuse_fields(source, layout)
    name = source.name
    if is_long(source):
        faults.add(TOO_LONG, name)
        return
    content = read_whole(source, faults)
    if content.count(b"<") > _MAX_TAGS:
        faults.add(f"HTML of more than {_MAX_TAGS:,} tags", name)
    elif _list_depth(content) > _MAX_LIST_DEPTH:
        faults.add(f"HTML with lists nested deeper than {_MAX_LIST_DEPTH}", name)
    else:
        yield sound_document(_text(content, name), name, faults)


def _text(content: bytes, name: str) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError as error:
        raise ValueError(
            f"input {name} is HTML, which needs resiliparse, pip install -e .[html]"
        ) from error
    try:
        page = content.decode("utf-8")
    except UnicodeDecodeError:
        encoding = detect_encoding(content, from_html_meta=True) or "latin1"
        page = bytes_to_str(content, encoding)
    return str(extract_plain_text(page, skip_elements=_AROUND, alt_texts=False))


def _list_depth(content: bytes) -> int:
    """Return how deep the lists of a page are nested, at most."""
    depth = deepest = 0
    for match in _LIST.finditer(content):
        depth += -1 if match[1] else 1
        deepest, depth = max(deepest, depth), max(depth, 0)
    return deepest
