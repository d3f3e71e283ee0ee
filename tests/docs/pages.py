"""The pages of the documentation as the tests read them: paragraphs, links and fenced blocks.

The language of a block is what it is for:

    bash, python   run as it stands, in the order of the pages, in one fresh clone
    output         what the block before it prints: these lines, in this order. Numbers are masked;
                   `...`, as a line or within one, stands for anything
    text           a drawing; not tested

The first line of a block may be a comment that restricts it, in view of every reader:

    # needs ...    cannot be run everywhere (8 GPUs, SLURM, a download); its options are parsed
    # refused      ends with an error, as shown
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
INDEX = ROOT / "docs" / "README.md"
LANGUAGES = {"bash", "python", "output", "text"}
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_NUMBER = re.compile(r"[-+]?\d+(,\d{3})*(\.\d+)?(e[-+]?\d+)?")


@dataclass
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    lines: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    @property
    def text(self):
        return "\n".join(self.lines) + "\n"

    @property
    def runs(self):
        return self.language in ("bash", "python") and not self.lines[0].startswith("# needs ")

    @property
    def refused(self):
        return self.lines[0].startswith("# refused")

    def __str__(self):
        return f"{self.page}:{self.line}"


@dataclass
class Page:
    """A page, cut up."""

    name: str
    """Relative to the root."""
    lines: list[str]
    blocks: list[Block] = field(default_factory=list)
    paragraphs: list[list[str]] = field(default_factory=list)
    """Runs of lines outside blocks; headings, tables and items of lists stand alone."""

    @property
    def commands(self):
        """The blocks of commands."""
        return [block for block in self.blocks if block.language in ("bash", "python")]

    @property
    def links(self):
        """The targets of its links."""
        return [target for lines in self.paragraphs for target in _LINK.findall(" ".join(lines))]

    @property
    def anchors(self):
        """What a link may name after #."""
        titles = [lines[0] for lines in self.paragraphs if lines[0].startswith("#")]
        words = [re.sub(r"[^\w\s-]", "", title.lstrip("# ").lower()) for title in titles]
        return {word.replace(" ", "-") for word in words}


@cache
def read_page(path):
    """Return the page in a file."""
    page = Page(str(path.relative_to(ROOT)), path.read_text().splitlines())
    block, paragraph = None, []
    for number, line in enumerate([*page.lines, ""], start=1):
        if line.startswith("```"):
            if block is None:
                block = Block(page.name, number, line[3:])
                page.blocks.append(block)
            else:
                block = None
        elif block is not None:
            block.lines.append(line)
        if block is not None or not line or line[0] in "#|`" or re.match(r"\s*([-*]|\d+\.) ", line):
            if paragraph:
                page.paragraphs.append(paragraph)
            paragraph = []
        if block is None and line and not line.startswith("```"):
            paragraph.append(line)
    for before, after in zip(page.blocks, page.blocks[1:], strict=False):
        if after.language == "output":
            before.expected.extend(after.lines)
    return page


@cache
def all_pages():
    """Return README, the index of docs/, the pages in its order, and CONTRIBUTING."""
    index = read_page(INDEX)
    names = [target for target in index.links if re.fullmatch(r"[\w-]+\.md", target)]
    paths = [ROOT / "README.md", INDEX, *(INDEX.parent / name for name in dict.fromkeys(names))]
    return [read_page(path) for path in [*paths, ROOT / "CONTRIBUTING.md"]]


def missing_lines(expected, printed):
    """Return the expected lines that do not come out, in order, among the printed ones."""
    left, missing = [masked(line) for line in printed], []
    for line in expected:
        if line.strip() == "...":
            continue
        pattern = ".*".join(re.escape(masked(part)) for part in line.split("..."))
        found = next((i for i, text in enumerate(left) if re.fullmatch(pattern, text)), None)
        if found is None:
            missing.append(line)
        else:
            left = left[found + 1 :]
    return missing


def masked(line):
    """Return a line with every number and every run of spaces alike."""
    return " ".join(_NUMBER.sub("0", line).split())
