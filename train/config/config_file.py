"""The fields of a run from a file: the config.json of a run, or YAML or TOML of the same fields.

Executes nothing of what it reads.
"""

import dataclasses
import logging
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from data.foreign_json import parse, unique
from data.suggestion import suggest
from train.config.config import TrainConfig, flat_fields
from train.config.synonyms import SYNONYMS

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 18
_BY_YAML = (TypeError, AttributeError, KeyError, IndexError, OverflowError)
"""What yaml raises for some texts that are no YAML, such as !!int of no digits."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 1  # lists in lists, which YAML may nest without end, are cut short
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def read_config(path: Path, base: TrainConfig | None) -> TrainConfig:
    """Return the configuration that a file holds.

    Args:
        path: The file, .json, .yaml, .yml or .toml; its fields by section, {optim: {lr: 1e-3}}, or
            by full name, {optim.lr: 1e-3}.
        base: What the file leaves out. None: the defaults; what has none must be in the file.

    Raises:
        ValueError: The file cannot be read, or fields are unknown, missing or of another type; one
            line for each problem.
    """
    kinds = dict(_kinds(TrainConfig))
    values: dict[str, object] = {}
    problems = []
    for name, value in _flat(_content(path), kinds):
        field = f"{path}: {name}: {_SHORT.repr(value)}"
        if name not in kinds:
            hint = suggest(name, [name for name in kinds if not _section(kinds[name])], SYNONYMS)
            hint = "take it out" if hint == "see --help" else hint
            problems.append(f"{field}, does not exist, {hint}")
            continue
        try:
            values[name] = _convert(value, kinds[name])
        except ValueError as error:
            problems.append(f"{field}, give {error}")
    if base is None and (missing := [*_missing(TrainConfig, values)]):
        problems.append(
            f"{path}: leaves out {', '.join(missing)}, give them, or name the preset that the "
            f"file changes: train/main.py PRESET --config {path}"
        )
    if problems:
        raise ValueError("\n".join(problems))
    config: TrainConfig = _build(TrainConfig, values, base)
    left_out = [name for name, _ in flat_fields(config.as_dict()) if name not in values]
    if base is None and left_out:  # as by the config.json of an earlier version
        names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.info("config: %s leaves %d fields at their defaults: %s", path, len(left_out), names)
    return config


def given_fields(path: Path) -> set[str]:
    """Return the full names of the fields that a file holds, if it can be read."""
    return {name for name, _ in _flat(_content(path), dict(_kinds(TrainConfig)))}


def _content(path: Path) -> Mapping[str, object]:
    """Return what is in the file."""
    readers = {
        ".json": lambda text: parse(text.encode()),
        ".yaml": lambda text: yaml.load(text, _Loader),  # a SafeLoader: it makes plain values alone
        ".yml": lambda text: yaml.load(text, _Loader),
        ".toml": tomllib.loads,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"config: {path}, give a file that ends in {', '.join(readers)}")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        content = read(text.decode())
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read, {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError, *_BY_YAML) as error:
        reason = " ".join(str(error).split())
        kind = path.suffix[1:]
        raise ValueError(f"config: {path} is not valid {kind}, {reason}, mend it") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds no fields, write them as in a run's config.json")
    return content


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader, which refuses a name that is given twice, and merges, which may explode."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if "<<" in names:
            raise ValueError("<< merges fields, write them out")
        unique([(name, None) for name in names])
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def _kinds(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the type of every field and section by its full name, a section before its fields."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name, hint
        if section := _section(hint):
            yield from _kinds(section, f"{prefix}{name}.")


def _section(hint: Any) -> type | None:
    """Return the dataclass of a section, which may be absent; None for a field."""
    for kind in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def _flat(
    content: Mapping[str, object], kinds: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Yield what is given by its full name; goes no deeper than sections do."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and _section(kinds.get(name)):
            yield from _flat(value, kinds, f"{name}.")
        else:
            yield name, value


def _convert(value: object, hint: Any) -> object:
    """Return a value as the type of its field.

    Raises:
        ValueError: It is of another type; the message is what it should be.
    """
    if isinstance(hint, UnionType):  # X | None
        [kind] = {*get_args(hint)} - {NoneType}
        return None if value is None else _convert(value, kind)
    if get_origin(hint) is Literal:
        if value in get_args(hint) and isinstance(value, str):
            return value
        raise ValueError(f"one of {', '.join(get_args(hint))}")
    if get_origin(hint) is tuple:
        return _convert_list(value, get_args(hint))
    if hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)  # to YAML 1e-3 is text, 1.0e-3 a number
        except (ValueError, OverflowError):
            pass
    elif type(value) is hint:
        return value
    raise ValueError(_WORDS.get(hint, "its fields, below its name"))


def _convert_list(value: object, kinds: tuple[Any, ...]) -> tuple[object, ...]:
    several = kinds[-1] is ...
    try:
        if isinstance(value, list) and (several or len(value) == len(kinds)):
            return tuple(_convert(item, kinds[0]) for item in value)
    except ValueError:
        pass
    raise ValueError(f"a list{'' if several else f' of {len(kinds)}'}, each {_WORDS[kinds[0]]}")


def _missing(kind: type, values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the fields and sections that have no default and are not given."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, section = prefix + field.name, _section(hints[field.name])
        given = any(other.startswith(f"{name}.") for other in values)
        if section and given:
            yield from _missing(section, values, f"{name}.")
        elif field.default is field.default_factory is dataclasses.MISSING and name not in values:
            yield name


def _build(kind: type, values: Mapping[str, object], base: Any, prefix: str = "") -> Any:
    """Return `base`, or the defaults of its kind, with the values that are given."""
    own: dict[str, object] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, section = prefix + field.name, _section(hints[field.name])
        if section and any(other.startswith(f"{name}.") for other in values):
            before = getattr(base, field.name, None)
            own[field.name] = _build(section, values, before, f"{name}.")
        elif name in values:
            own[field.name] = values[name]
    return kind(**own) if base is None else dataclasses.replace(base, **own)
