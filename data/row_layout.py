"""The fields of a row that are a document: one of text, a chat, or a prompt and a response."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Annotated

import tyro

from data.chat_template import ChatError, ChatTemplate
from data.chats import CHATS, read_messages
from data.faults import EMPTY, Faults

# Half a surrogate pair, which a JSON escape can put into a str, has no UTF-8 form.
_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and its origin: a path, or a path and a line or row."""

    origin: str
    text: str
    spans: Sequence[int] | None = None
    """Where reading and learning alternate, in characters, reading first: of a pair the length of
    its prompt alone, 0 for an empty one. None: plain text, learnt from its BOS on."""
    special: Sequence[int] = ()
    """Start and end of each special token in the text, in characters."""


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
    messages: str = ""
    """Rows are chats: the field of their turns, such as messages or conversations. The assistant's
    are learnt; empty: rows are no chats."""
    chat_template: str | None = None
    """jinja template of chats, a file or chatml; the tokenizer's own if not given."""
    template: Annotated[ChatTemplate | None, tyro.conf.Suppress] = None
    """The template, opened."""

    @property
    def is_learnt_in_part(self) -> bool:
        """Whether a part of each document is read alone."""
        return bool(self.response or self.messages)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that are read."""
        if self.messages:
            return (self.messages,)
        if not self.response:
            return (self.text_field,)
        return tuple(dict.fromkeys(_names(self.prompt) + _names(self.response)))

    @property
    def options(self) -> str:
        """The options that name the fields."""
        if self.messages:
            return "messages"
        return "prompt and response" if self.response else "text_field"

    def naming(self, field: str) -> str:
        """Return a field with the option that selects it, for messages."""
        if self.messages:
            return f"messages {field}"
        if not self.response:
            return f"text_field {field}"
        return f"{'response' if field in _names(self.response) else 'prompt'} field {field}"

    def chats_hint(self, fields: Sequence[str]) -> str:
        """Return how to read the chats of rows with such fields, where that is not asked for."""
        chats = [] if self.messages else [field for field in CHATS if field in fields]
        return f", but chats, give --messages {chats[0]}" if chats else ""

    def problems(self) -> list[str]:
        """Return what is wrong with the format strings, one line each; empty when nothing is."""
        if self.messages and (self.prompt or self.response):
            return [f"messages {self.messages!r} and prompt or response, give one of them"]
        if self.chat_template is not None and not self.messages:
            return [f"chat_template {self.chat_template!r} has no messages, give --messages FIELD"]
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
        if self.messages and isinstance(row, Mapping) and row.get(self.messages) is not None:
            return self._chat(row[self.messages], origin, faults)
        texts = {}
        for name in self.fields:
            if not isinstance(row, Mapping) or name not in row:
                kinds = {*map(type, row.values())} if isinstance(row, Mapping) else {str}
                nor = ", nor any text" if list in kinds and str not in kinds else ""
                if isinstance(row, Mapping) and (chats := self.chats_hint([*row])):
                    nor = chats
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
        return sound_document(text, origin, faults, spans=(len(prompt),))

    def _chat(self, value: object, origin: str, faults: Faults) -> Document | None:
        """Return the document of a chat."""
        assert self.template is not None
        try:
            messages = read_messages(value)
        except ValueError as reason:
            faults.add(f"field '{self.messages}' {reason}", origin)
            return None
        try:
            text, spans, special = self.template.spans(messages, origin)
        except ChatError as reason:
            faults.add("chat that its template refuses", f"{origin}, {reason}")
            return None
        return sound_document(text, origin, faults, spans=spans, special=special)


def sound_document(
    text: str,
    origin: str,
    faults: Faults,
    *,
    spans: Sequence[int] | None = None,
    special: Sequence[int] = (),
) -> Document | None:
    """Return the document if its text is sound, else count the fault."""
    if not text.strip():
        faults.add(EMPTY, origin)
    elif "\0" in text:
        faults.add("NUL character", origin)
    elif not text.isascii() and _SURROGATE.search(text):
        faults.add("invalid UTF-8", origin)
    else:
        return Document(origin, text, spans, special)
    return None


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
