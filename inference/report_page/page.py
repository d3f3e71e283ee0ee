"""The page: sections of figures and tables in one file that loads nothing from elsewhere.

Its policy lets no other script run, and nothing be loaded, whatever a text of others holds.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from inference.report_page.drawing import Drawn, style_variables
from inference.report_page.source import OWN, Source
from inference.report_page.visible import safe


@dataclass(frozen=True)
class Section:
    """One part of the report."""

    name: str
    """In links to it."""
    title: str
    body: str
    """HTML."""
    pictures: Sequence[Drawn] = ()
    """Those in it, to be written as files too."""


def figure(picture: Drawn, caption: str, source: Source) -> str:
    """Return a picture with its caption, which is HTML, and where its numbers come from."""
    text = f"<figcaption><p>{caption}</p>{source_line(source)}</figcaption>"
    return f'<figure id="fig-{picture.name}">{picture.svg}{text}</figure>'


def source_line(source: Source) -> str:
    """Return where numbers come from."""
    command = f"<code>{safe(source.command, 400)}</code>"
    if source.command == OWN:
        command = f'<a href="#machine">{command}</a>'
    parts = [command, safe(source.how)]
    parts += [safe(part) for part in (source.machine, source.date) if part]
    dot = " \N{MIDDLE DOT} "
    return f'<p class="source">{dot.join(part for part in parts if part)}</p>'


def note(text: str) -> str:
    """Return a line on what is not there; `text` is plain."""
    return f'<p class="note">{safe(text, 1000)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """Return a table, its first column to the left; all cells and the caption are HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    title = f'<p class="caption">{caption}</p>' if caption else ""
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    inside = f"<table>{top}<tbody>{body}</tbody></table>"
    label = safe(caption) or "table"
    return (
        f'{title}<div class="scroll" tabindex="0" role="region" aria-label="{label}">{inside}</div>'
    )


def page(title: str, lead: str, facts: Sequence[tuple[str, str]], sections: list[Section]) -> str:
    """Return the page.

    Args:
        title: Plain text.
        lead: One line on what was run, plain text.
        facts: The main numbers, each with what it is, plain text.
        sections: In their order.
    """
    script, style = _file("page.js"), style_variables() + _file("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    policy += f"script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections)
    numbers = "".join(
        f"<div><dt>{safe(what)}</dt><dd>{safe(value)}</dd></div>" for value, what in facts
    )
    body = "\n".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title">'
        f'<h2 id="{s.name}-title">{escape(s.title)}</h2>{s.body}</section>'
        for s in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{safe(title)}: report of a run</title>
<style>{style}</style></head>
<body><header><p class="kind">Report of a run</p><h1>{safe(title)}</h1>
<p class="lead">{safe(lead, 1000)}</p><dl class="facts">{numbers}</dl>
<nav aria-label="Sections">{links}</nav></header>
<main>{body}</main>
<div id="tip" role="tooltip" hidden></div>
<script>{script}</script></body></html>
"""


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
