"""README and docs keep their form, their links lead somewhere, and their options exist."""

import ast
import re
from functools import cache

import pytest

from tests.docs.option_parsers import parse_command, words_of
from tests.docs.pages import LANGUAGES, ROOT, all_pages, masked, missing_lines, read_page

PAGES = all_pages()
BLOCKS = [block for page in PAGES for block in page.commands]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_every_page_is_in_the_index():
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} <= {
        page.name for page in PAGES
    }


def test_readme_is_short():
    readme = PAGES[0]
    assert len(readme.lines) <= 140
    assert max(len(line) for block in readme.blocks for line in block.lines) <= 100


@by_name
def test_paragraphs_are_short(page):
    for paragraph in page.paragraphs:
        assert len(paragraph) <= 5, f"{page.name}: {paragraph[0]}"
        for line in paragraph:
            assert len(line) <= 100 or line[0] == "|", f"{page.name}: {line}"


@by_name
def test_a_page_opens_with_a_sentence_and_a_command(page):
    title, purpose = page.paragraphs[:2]
    assert title[0].startswith("# ")
    assert " ".join(purpose).count(". ") == 0
    assert purpose[-1].endswith((".", ":"))
    assert page.commands[0].line < 25


@by_name
def test_links_lead_somewhere(page):
    here = (ROOT / page.name).parent
    for target in page.links:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = here / name if name else ROOT / page.name
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in read_page(path.resolve()).anchors, f"{page.name}: {target}"


@by_name
def test_blocks_are_of_known_languages(page):
    for block, before in zip(page.blocks, [None, *page.blocks], strict=False):
        assert block.language in LANGUAGES, block
        if block.language == "output":
            assert before.language in ("bash", "python"), f"{block}: output of nothing"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_options_exist(block, tmp_path):
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif not block.refused:
        for words in words_of(block, tmp_path):
            try:
                parse_command(words)
            except (ValueError, SystemExit) as error:
                pytest.fail(f"{block}: {' '.join(words)}: {error}")


@by_name
def test_files_that_pages_name_exist(page):
    text = "\n".join(page.lines)
    folders = "train|models|loss|data|inference|launch|tests|benchmarks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.]+)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@by_name
def test_names_beside_files_are_in_them(page):
    for name, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", "\n".join(page.lines)):
        text = next(ROOT.rglob(name)).read_text()
        for symbol in re.findall(r"`([\w.]+)`", names):
            assert symbol.split(".")[-1] in text, f"{page.name}: {symbol} in {name}"


def test_numbers_are_masked_and_lines_keep_their_order():
    printed = ["step 25/500 | J 6.711", "E  loss", "1  -5.0e-3   12,345", "step-07, done"]
    assert not missing_lines(["step 1/60 | J 3.1", "...", "1 2 3", "step-..., done"], printed)
    assert missing_lines(["1 2 3", "E  loss"], printed) == ["E  loss"]
    assert missing_lines(["step 25/500 | K 6.711"], printed) == ["step 25/500 | K 6.711"]
    assert masked("a  -1.5 b") == masked("a 2 b")


@cache
def messages():
    """Return the texts in our code, one a line, with ... for what is put into them."""
    found = []
    for package in ("train", "models", "loss", "data", "inference"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = [*ast.walk(ast.parse(path.read_text()))]
            found += [text_of(node) for node in nodes if isinstance(node, ast.JoinedStr)]
            found += [
                re.sub(r"%[.\d]*[sdrf]", "...", node.value)
                for node in nodes
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    return "\n".join(found)


def text_of(node):
    return "".join(
        getattr(part, "value", "...") if isinstance(part, ast.Constant) else "..."
        for part in node.values
    )


def test_messages_of_troubleshooting_are_those_of_the_code():
    page = read_page(ROOT / "docs" / "troubleshooting.md")
    quoted = [match[1] for line in page.lines if (match := re.match(r"\| `(.*?)` \|", line))]
    assert len(quoted) > 20
    assert not [text for text in quoted if text.removesuffix(", ...") not in messages()]
