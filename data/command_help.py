"""The help of options from docstrings, each paragraph joined to one line, and the command's name.

tyro wraps the help to the terminal but keeps the line breaks of a docstring that is indented, as
those of fields are, so that the help would be broken twice.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

JOINED_HELP = ConstructorRegistry()
"""A context in which `tyro.cli` joins the lines of each paragraph."""

_entered: list[type] = []


@JOINED_HELP.struct_rule
def _join_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return tyro's own specification of a dataclass, with the help of its fields joined."""
    if not is_dataclass(info.type) or info.type in _entered:
        return None
    _entered.append(info.type)  # the rule for it is then tyro's own
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _entered.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    fields = [replace(each, helptext=partial(_joined, each.helptext)) for each in spec.fields]
    return replace(spec, fields=tuple(fields))


def _joined(text: str | Callable[[], str | None] | None) -> str | None:
    text = text() if callable(text) else text
    return text and re.sub(r"(?<!\n)\n[ \t]*(?=\w)", " ", text)


def paragraphs(kind: type) -> str:
    """Return a docstring, each paragraph one line; lines that are indented stay as they are."""
    return re.sub(r"(?<!\n)\n(?![\n ])", " ", inspect.getdoc(kind) or "")


def called_as(prog: str) -> str:
    """Return how the user called the command: as `python -m` or as a verb of skipstone."""
    script, verb = [*sys.orig_argv, "", ""][1:3]
    return f"skipstone {verb}" if Path(script).name == "skipstone" else prog
