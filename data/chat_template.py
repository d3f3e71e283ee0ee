"""Chats as text, through the jinja template of a tokenizer: what is read, and what is learnt.

A template is a file of others: it runs in jinja's sandbox, with what transformers gives it, and is
tried in a process of bounded time and memory first. Independent of files and token ids.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

# Around what messages hold of special tokens, and around what is generated.
_TEXT, _TEXT_END, _LEARNT, _LEARNT_END = map(chr, range(0xF0000, 0xF0004))
MARKS = re.compile(f"[{_TEXT}-{_LEARNT_END}]")
"""Characters that no chat may hold."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = datetime(2024, 7, 26)
"""Today to a template: a dataset is the same on every day. Llama 3.1's template takes this date
where it has none."""
_MAX_CHARS = 2**28
_TRIAL_SECONDS, _TRIAL_BYTES = 10, 2**31
_TRIAL = """\
import json, sys
sys.path[:], *given = json.load(sys.stdin)
import data.chat_template
data.chat_template._run_trial(*given)
"""
_USER, _ASSISTANT = ({"role": role, "content": "Yes."} for role in ("user", "assistant"))
_TRIED = ([_USER], [_USER, _ASSISTANT, _USER, _ASSISTANT], [_USER | {"role": "system"}, _USER])


class ChatError(ValueError):
    """A chat that its template refuses."""


class Rendered(NamedTuple):
    """A chat as text."""

    text: str
    special: tuple[int, ...]
    """Start and end of each special token that the template wrote, in characters."""
    learnt: tuple[int, ...]
    """Start and end of what its generation blocks wrote."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens of its tokenizer."""

    name: str
    """For messages."""
    source: str
    bos_token: str
    eos_token: str
    special: tuple[str, ...]
    """Strings that are a token where the template writes them, and text within messages."""

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
        """Return a chat as text, without BOS at its start.

        Args:
            messages: role, content, and whatever else the template reads.
            prompt: Whether to end with the beginning of an answer.

        Raises:
            ChatError: the template refuses it.
        """
        pieces, chars = [], 0
        special = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        try:
            protected = _protected(messages, special) if self.special else messages
            for piece in _compiled(self.source).generate(
                messages=protected,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            ):
                chars += len(piece)
                if chars > _MAX_CHARS:
                    raise ChatError("its text is too long")
                pieces.append(piece)
        except ChatError:
            raise
        except Exception as error:  # an expression in a template may raise any
            reason = " ".join(str(error).split())[:80]
            raise ChatError(reason or type(error).__name__) from error
        return _unmarked("".join(pieces), special if self.special else None, self.bos_token)

    def spans(
        self, messages: Sequence[Message], origin: str
    ) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Return text, where reading and learning alternate, and the special tokens in it.

        The turns of the assistant are learnt, with the token that ends them: what stands in
        generation blocks, or else what an answer adds to the prompt before it. BOS at the start and
        EOS at the end, which every document has, are left out.

        Args:
            messages: the chat.
            origin: for messages.

        Raises:
            ChatError: the template refuses it, or there is nothing to learn in it.
            ValueError: the template shows no place where an answer begins.
        """
        whole = self.render(messages)
        if _GENERATION.search(self.source):
            learnt = [*zip(whole.learnt[::2], whole.learnt[1::2], strict=True)]
        else:
            learnt = [
                self._answer(messages, i, whole, origin)
                for i, message in enumerate(messages)
                if message.get("role") == "assistant"
            ]
        learnt = [(start, end) for start, end in learnt if start < end]
        if not learnt:
            raise ChatError("it has no answer of an assistant")
        text = whole.text
        if not text[learnt[-1][1] :].strip():
            text = text[: learnt[-1][1]]  # EOS follows the answer
        ends = whole.special[1::2]
        without = text.rstrip().removesuffix(self.eos_token)
        if self.eos_token in self.special and len(without) + len(self.eos_token) in ends:
            text = without
        bounds = [min(bound, len(text)) for span in _joined(learnt) for bound in span]
        if bounds[-1] == len(text):
            bounds.pop()
        special = [bound for bound in whole.special if bound <= len(text)]
        return text, tuple(bounds), tuple(special[: len(special) // 2 * 2])

    def _answer(
        self, messages: Sequence[Message], i: int, whole: Rendered, origin: str
    ) -> tuple[int, int]:
        """Return start and end of an answer, with the special token that ends it."""
        before = self.render(messages[:i], prompt=True).text
        after = self.render(messages[: i + 1])
        if not after.text.startswith(before) or not whole.text.startswith(after.text.rstrip()):
            raise ValueError(
                f"chat_template: {self.name} writes the first {i + 1} messages of {origin} "
                "otherwise alone than before others, give one with {% generation %} blocks"
            )
        start, end = len(before), len(after.text)
        last = max((at for at in after.special[1::2] if start < at), default=end)
        return start, last if not after.text[last:].strip() else end

    def check(self) -> None:
        """Try the template on small chats, in a process of its own.

        Raises:
            ValueError: it is no template, or takes too long or too much memory.
        """
        try:
            done = subprocess.run(
                [sys.executable, "-c", _TRIAL],
                input=json.dumps([sys.path, self.source, _TRIAL_SECONDS, _TRIAL_BYTES]).encode(),
                capture_output=True,
                timeout=20 * _TRIAL_SECONDS,
                check=False,
            )
            status, reason = done.returncode, done.stdout.decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            status, reason = -1, ""
        if reason:
            raise ValueError(f"chat_template: {self.name} is no template ({reason}), give another")
        if status:
            raise ValueError(
                f"chat_template: {self.name} takes over {_TRIAL_SECONDS} s or "
                f"{_TRIAL_BYTES >> 30} GiB for a chat of two turns, give another"
            )


def _run_trial(source: str, seconds: int, num_bytes: int) -> None:
    """Render small chats within limits; print why the template is none."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template = ChatTemplate("", source, "", "", ())
    try:
        _compiled(source)
    except MemoryError:
        sys.exit(1)
    except Exception as error:  # of the parser, or of Python's for what it made of the template
        print(f"{' '.join(str(error).split())[:200] or type(error).__name__}")
        return
    for messages in _TRIED:
        try:
            template.render(messages, prompt=True)
        except ChatError as error:
            if isinstance(error.__cause__, MemoryError):
                sys.exit(1)


@lru_cache(4)
def _compiled(source: str) -> "Template":
    """Return a template in the environment that transformers makes for it."""
    import jinja2  # Imported here: only chats need it.
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant writes."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_LEARNT}{caller()}{_LEARNT_END}"

    def refuse(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": _DATE.strftime}
    return environment.from_string(source)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; jinja's own filter would escape what HTML reserves."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _protected(value: Any, special: re.Pattern[str]) -> Any:
    """Return messages in which marks stand around the names of special tokens."""
    if isinstance(value, str):
        return special.sub(lambda found: f"{_TEXT}{found[0]}{_TEXT_END}", value)
    if isinstance(value, Mapping):
        return {key: _protected(item, special) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_protected(item, special) for item in value]
    return value


def _unmarked(text: str, special: re.Pattern[str] | None, bos_token: str) -> Rendered:
    """Return a text without marks, and where its special tokens and its answers are."""
    found: list[int] = []
    learnt: list[int] = []
    plain: list[str] = []
    at, chars, is_text = 0, 0, False
    pattern = re.compile(MARKS.pattern + (f"|{special.pattern}" if special else ""))
    for match in pattern.finditer(text):
        plain.append(text[at : match.start()])
        chars += len(plain[-1])
        at = match.end()
        if match[0] in (_LEARNT, _LEARNT_END):
            learnt.append(chars)
            continue
        if match[0] in (_TEXT, _TEXT_END):
            is_text = match[0] == _TEXT
            continue
        if match.start() == 0 and match[0] == bos_token:
            continue
        if not is_text:
            found += (chars, chars + len(match[0]))
        plain.append(match[0])
        chars += len(match[0])
    return Rendered("".join(plain) + text[at:], tuple(found), tuple(learnt))


def _joined(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield spans in order, those that touch as one."""
    first, *others = sorted(spans)
    start, end = first
    for begin, stop in others:
        if begin > end:
            yield start, end
            start = begin
        end = max(end, stop)
    yield start, end
