"""Chats of a row: the messages as a template reads them, and where a template lies.

A template is kept as `chat_template.jinja` beside the tokenizer: in datasets, checkpoints and
exports.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.chat_template import MARKS, ChatTemplate, Message
from data.foreign_json import read_object
from data.tokenizer import Tokenizer

CHATS = ("messages", "conversations")
"""Usual names of the field of a row that holds a chat."""
TEMPLATE_NAME = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_MAX_BYTES = 2**20

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
}
"""Templates by name."""

TRAINED = ("<s>", "</s>", ("</s>", "<s>"))
"""BOS, EOS and the special tokens of `train_tokenizer`."""

_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of ShareGPT's."""


def find_template(*tokenizers: Path | None) -> str | None:
    """Return the chat template beside the first of some tokenizers' files that has one.

    Raises:
        ValueError: it cannot be read.
    """
    for tokenizer in filter(None, tokenizers):
        path = tokenizer.with_name(TEMPLATE_NAME)
        if found := read_template(path) if path.is_file() else _in_config(tokenizer):
            return found
    return None


def _in_config(tokenizer: Path) -> str | None:
    config = tokenizer.with_name(_CONFIG)
    if not config.is_file():
        return None
    try:
        found = read_object(config).get("chat_template")
    except ValueError as error:
        raise ValueError(f"tokenizer: {config} is damaged ({error}), replace it") from None
    if isinstance(found, list):  # several, by name
        found = next(
            (
                x.get("template")
                for x in found
                if isinstance(x, dict) and x.get("name") == "default"
            ),
            None,
        )
    if not found:
        return None
    if not isinstance(found, str) or len(found.encode(errors="replace")) > _MAX_BYTES:
        raise ValueError(
            f"tokenizer: {config}: chat_template is no text of at most {_MAX_BYTES} bytes, mend it"
        )
    return found


def read_template(path: Path) -> str:
    """Return the template in a file.

    Raises:
        ValueError: it cannot be read, is too long, or no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"chat_template: {path} cannot be read ({reason}), give another") from None


def open_template(tokenizer: Tokenizer | None, given: str | None = None) -> ChatTemplate:
    """Return the template of chats.

    Args:
        tokenizer: Its special tokens are those of the template; None: one that `train_tokenizer`
            will make.
        given: a file, or a name in `BUILT_IN`; None: the tokenizer's own.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    path = tokenizer.path if tokenizer else "a new tokenizer"
    if given is None:
        name, source = f"that of {path}", find_template(tokenizer.path) if tokenizer else None
    else:
        name, source = given, BUILT_IN.get(given) or read_template(Path(given))
    if source is None:
        raise ValueError(
            f"chat_template: {path} has none, give --chat_template, a file or one of: "
            f"{', '.join(BUILT_IN)}"
        )
    special: tuple[str, ...]
    bos_token, eos_token, special = TRAINED
    if tokenizer:
        names = {number: token for token, number in tokenizer.special.items()}
        bos_token, eos_token = (names.get(i, "") for i in (tokenizer.bos_id, tokenizer.eos_id))
        special = tuple(sorted(tokenizer.special))
    template = ChatTemplate(name, source, bos_token, eos_token, special)
    template.check()
    return template


def read_messages(value: object) -> list[Message]:
    """Return the messages of a row, ready for a template.

    Args:
        value: a list of {"role", "content"}, or ShareGPT's {"from", "value"}; or JSON of one.

    Raises:
        ValueError: it is none, with the reason alone.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise ValueError("is no list of messages")
    messages = [_message(message) for message in value]
    try:
        text = json.dumps(messages, ensure_ascii=False, default=str)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    if MARKS.search(text):
        raise ValueError("holds a private character, U+F0000 to U+F0003")
    return messages


def _message(given: Mapping[str, Any]) -> Message:
    """Return a message with role and content; fields without a value are left out."""
    fields = {key: value for key, value in given.items() if value is not None}
    if "from" in fields and "role" not in fields:
        fields |= {"role": fields.pop("from"), "content": fields.pop("value", "")}
    role, content = fields.get("role"), fields.get("content", "")
    if not isinstance(role, str):
        raise ValueError("has a message without a role")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("has an image or another part that is no text")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise ValueError("has a message without text")
    return fields | {"role": _ROLES.get(role, role), "content": content}
