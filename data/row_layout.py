"""The fields of a row that are a document: one of text, or those of a prompt and a response."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from data.faults import EMPTY, Faults

# Half a surrogate pair, which a JSON escape can put into a str, has no UTF-8 form.
_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and its origin: a path, or a path and a line or row."""

    origin: str
    text: str
    prompt_chars: int | None = None
    """Of a pair, the number of characters of its prompt, which begins the text and is not learnt; 0
    for an empty prompt. None: plain text, learnt from its BOS on."""


@dataclass(frozen=True)
class RowLayout:
    """How fields of a row become a document."""

    text_field: str = "text"
    """JSON field or Parquet column that holds the text; unused where there is a response."""
    prompt: str = ""
    """Rows are pairs: the prompt, which is read but not learnt, such as
    'Utterance: {utterance}\\nParse:' with the names of fields in braces; \\n is a new line."""
    response: str = ""
    """Rows are pairs: what follows the prompt and is learnt, such as ' {parse}'; empty: rows are
    plain text."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that are read."""
        if not self.response:
            return (self.text_field,)
        return tuple(dict.fromkeys(_names(self.prompt) + _names(self.response)))

    @property
    def options(self) -> str:
        """The options that name the fields."""
        return "prompt and response" if self.response else "text_field"

    def naming(self, field: str) -> str:
        """Return a field with the option that selects it, for messages."""
        if not self.response:
            return f"text_field {field}"
        return f"{'response' if field in _names(self.response) else 'prompt'} field {field}"

    def problems(self) -> list[str]:
        """Return what is wrong with the format strings, one line each; empty when nothing is."""
        if not self.response:
            return [f"prompt {self.prompt!r} has no response, give both"] if self.prompt else []
        found = []
        for kind, template in (("prompt", self.prompt), ("response", self.response)):
            try:
                names = _names(template)
            except ValueError as error:
                found.append(f"{kind} {template!r} is no format string ({error})")
                continue
            if not names:
                found.append(f"{kind} {template!r} names no field, write one like {{{kind}}}")
            elif not all(name.isidentifier() for name in names):
                found.append(f"{kind} {template!r} names {names}, give names of fields alone")
        return found

    def document(self, row: object, origin: str, faults: Faults) -> Document | None:
        """Return the document of a row {field: value} if it is sound, else count the fault."""
        texts = {}
        for name in self.fields:
            if not isinstance(row, Mapping) or name not in row:
                kinds = {*map(type, row.values())} if isinstance(row, Mapping) else {str}
                nor = ", nor any text" if list in kinds and str not in kinds else ""
                faults.add(f"no field '{name}'{nor}", origin)
                return None
            if not isinstance(row[name], str):
                faults.add(f"field '{name}' is not a string", origin)
                return None
            texts[name] = row[name]
        if not self.response:
            return sound_document(texts[self.text_field], origin, faults)
        if not all(texts[name].strip() for name in _names(self.response)):
            faults.add("empty response", origin)
            return None
        prompt = self.prompt.format_map(texts)
        text = prompt + self.response.format_map(texts)
        return sound_document(text, origin, faults, prompt_chars=len(prompt))


def sound_document(
    text: str, origin: str, faults: Faults, *, prompt_chars: int | None = None
) -> Document | None:
    """Return the document if its text is sound, else count the fault."""
    if not text.strip():
        faults.add(EMPTY, origin)
    elif "\0" in text:
        faults.add("NUL character", origin)
    elif not text.isascii() and _SURROGATE.search(text):
        faults.add("invalid UTF-8", origin)
    else:
        return Document(origin, text, prompt_chars)
    return None


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
