"""How the words of a command line become values, where tyro alone reads or reports them otherwise.

Imports `urls` alone of ours.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from data.urls import Location, is_url, location

T = TypeVar("T")

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read `X | None` as X, or as None for the word None; tyro alone names no fault of X."""
    kinds = get_args(info.type)
    if NoneType not in kinds or (len(kinds) != 2 and info.type != Location | None):
        return None
    kind: Any = next(kind for kind in kinds if kind is not NoneType)
    kind = Location if info.type == Location | None else kind
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        instance_from_str=lambda words: (
            None if words == ["None"] else spec.instance_from_str(words)
        ),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda v: ["None"] if v is None else spec.str_from_instance(v),
        choices=spec.choices and (*spec.choices, "None"),
    )


@REGISTRY.primitive_rule
def _yes_or_no(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read true and false in any case, and an option without a value as True."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="{True,False}",
        instance_from_str=_read_yes_or_no,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _read_yes_or_no(words: list[str]) -> bool:
    word = words[0] if words else "true"
    if word.lower() not in ("true", "false"):
        raise ValueError(f"{word}, give one of False, True")
    return word.lower() == "true"


@REGISTRY.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    return read_as("PATH", read_path) if info.type is Path else None


@REGISTRY.primitive_rule
def _location(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    return read_as("PATH|URL", read_location) if info.type == Location else None


def read_location(text: str) -> Location:
    """Return a path or a URL.

    Raises:
        ValueError: It is empty, or a URL without a name.
    """
    return location(text) if text else read_path(text)


def read_path(text: str) -> Path:
    """Return a path; an empty one, as of a shell variable that is not set, is not the folder `.`.

    Raises:
        ValueError: It is empty, or a URL.
    """
    if not text:
        raise ValueError("empty, name a file or a folder")
    if is_url(text):
        raise ValueError(f"{text} is a URL, give a path of this machine")
    return Path(text)


def read_as(
    metavar: str, read: Callable[[str], T], write: Callable[[T], str] = str
) -> PrimitiveConstructorSpec[T]:
    """Return the annotation of a type that is written as one word.

    Args:
        metavar: What the help calls the word.
        read: Returns the value; the message of its ValueError is shown after the option's name.
        write: Returns the word for a value, for the defaults in the help.
    """
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [write(value)],
    )
