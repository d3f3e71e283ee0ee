"""JSON that others wrote: bounded in bytes, depth and values, its fields of the types they need.

Every room may import this file, which imports none of ours. Its errors are a reason alone, such as
`dim: 'x', give an integer`; the caller adds the file and the remedy.
"""

import dataclasses
import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_BYTES = 2**26
"""The largest tokenizer.json in use has half of it."""
MAX_VALUES = 4_000_000
"""Each takes about 100 bytes in memory; the largest tokenizer.json in use has half as many."""
MAX_DEPTH = 64

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 1
_LISTS = (tuple, list, Sequence)
_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that is the content of a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such JSON.
    """
    with path.open("rb") as file:
        return parse_object(file.read(MAX_BYTES + 1))


def parse_object(text: bytes) -> dict[str, Any]:
    """Return the object that UTF-8 text holds.

    Raises:
        ValueError: It is none, not JSON, or too large or deep.
    """
    content = parse(text)
    if not isinstance(content, dict):
        raise ValueError(f"{shown(content)} is no JSON object, {{...}}")
    return content


def parse(text: bytes, *, finite: bool = True) -> object:
    """Return what UTF-8 text holds.

    Args:
        text: The JSON.
        finite: Whether to refuse NaN and Infinity, which only our own logs may hold.

    Raises:
        ValueError: It is not JSON, or too large or deep.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        content = json.loads(
            text.decode(),
            object_pairs_hook=unique,
            parse_constant=_refuse_constant if finite else float,
            parse_float=_finite if finite else float,
        )
        deep = _is_deep(content)
    except RecursionError:
        deep = True
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # of Python, with a remedy for programmers
            raise ValueError("a number in it has too many digits") from None
        raise
    if deep:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    return content


def unique(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs of an object.

    Raises:
        ValueError: A name is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name:.80} is given twice")
    return found


def build(kind: type[T], content: object) -> T:
    """Return a dataclass whose fields are those of an object.

    Raises:
        ValueError: A field is missing, unknown or of another type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{shown(content)} is no JSON object, {{...}}")
    hints = get_type_hints(kind)
    if unknown := sorted(map(str, content.keys() - hints.keys())):
        raise ValueError(f"{shown(unknown[0])} is no field of it")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in content:
            raise ValueError(f"{field.name} is missing")
    return kind(**{name: typed(value, hints[name], name) for name, value in content.items()})


def take(content: Mapping[str, Any], name: str, hint: Any) -> Any:
    """Return a field of an object, of the type `hint`, see `typed`.

    Raises:
        ValueError: It is missing or of another type.
    """
    if name not in content:
        raise ValueError(f"{name} is missing")
    return typed(content[name], hint, name)


def typed(value: object, hint: Any, name: str) -> Any:
    """Return a value of JSON as the type of its field.

    Args:
        value: What was read.
        hint: A plain type, X | None, a Literal, a tuple, list or mapping of such, or a dataclass.
        name: Of the field.

    Raises:
        ValueError: It is of another type.
    """
    origin, kinds = get_origin(hint), get_args(hint)
    if isinstance(hint, UnionType):  # X | None, or int | str
        if value is None and NoneType in kinds:
            return None
        kinds = tuple(kind for kind in kinds if kind is not NoneType)
        same = [kind for kind in kinds if type(value) is kind]
        return typed(value, (same or kinds)[0], name)
    if origin is Literal:
        if isinstance(value, str) and value in kinds:
            return value
        raise ValueError(f"{name}: {shown(value)}, give one of {', '.join(map(str, kinds))}")
    if origin in _LISTS and isinstance(value, list):
        found = [typed(item, kinds[0], f"{name}[{i}]") for i, item in enumerate(value)]
        return tuple(found) if origin is tuple else found
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: typed(item, kinds[1], f"{name}.{key:.40}") for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        try:
            return build(hint, value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if hint in (Any, object) or type(value) is hint or (hint is float and _is_number(value)):
        return value
    if isinstance(hint, type) and hint not in _WORDS and isinstance(value, hint):
        return value  # made by the caller
    default = "a list" if origin in _LISTS else "fields, {...}"
    raise ValueError(f"{name}: {shown(value)}, give {_WORDS.get(hint, default)}")


def shown(value: object) -> str:
    """Return a value for a message, cut short."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a longer number"  # which has no text beyond 4300 digits
    return _SHORT.repr(value)


def is_plain(name: str) -> bool:
    """Whether `name` is that of a file in the folder itself."""
    return "/" not in name and "\0" not in name and name not in ("", ".", "..")


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1023
    return isinstance(value, float) and math.isfinite(value)


def _is_deep(content: object) -> bool:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        items = chain.from_iterable(
            each.values() if isinstance(each, dict) else each for each in level
        )
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value
