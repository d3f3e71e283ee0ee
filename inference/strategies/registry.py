"""Strategies by name, and as text: `name` or `name:setting=value:setting=value`.

Each strategy is in the file of its name. To add one, write its file and list its class here.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data.option_values import read_path
from data.suggestion import suggest
from inference.engine.strategy import Strategy
from inference.strategies.autoregressive import Autoregressive
from inference.strategies.calm import Calm
from inference.strategies.dynamic import Dynamic
from inference.strategies.early_exit import EarlyExit
from inference.strategies.free import Free
from inference.strategies.gate import Gate
from inference.strategies.jump import Jump
from inference.strategies.patience import Patience
from inference.strategies.pruned import Pruned
from inference.strategies.routed import Routed
from inference.strategies.self_speculative import SelfSpeculative
from inference.strategies.skip_draft import SkipDraft
from inference.strategies.skipdecode import SkipDecode
from inference.strategies.speculative import Speculative
from inference.strategies.unified import Unified

STRATEGIES: Mapping[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        Autoregressive,
        EarlyExit,
        SelfSpeculative,
        Dynamic,
        SkipDraft,
        Speculative,
        Calm,
        Patience,
        Gate,
        Jump,
        Free,
        Unified,
        SkipDecode,
        Pruned,
        Routed,
    )
}
"""All strategies, by name."""

_LARGEST_FLOAT = 3.4e38
"""Of 32 bits, the type of tensors that settings are compared with."""


def parse_strategy(text: str, **settings: str | None) -> Strategy:
    """Return the strategy that `text` describes; its settings are not checked against a model.

    Args:
        text: `name`, or `name:setting=value:...`. Numbers as in Python; true or false; the numbers
            of a list joined by "+", as in 0+3+7; none for a setting to be left open.
        settings: Further settings, as text; those that are None, or that the strategy does not
            have, are ignored.

    Raises:
        ValueError: The strategy or a setting does not exist, or a value cannot be read.
    """
    name, *parts = text.split(":")
    if name not in STRATEGIES:
        raise ValueError(f"strategy: {name or 'empty'}, {suggest(name, [*STRATEGIES])}")
    kind = STRATEGIES[name]
    known = setting_types(kind)
    given: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"strategy: {part!r} in {text!r} is no setting, write name=value")
        if key not in known:
            hint = suggest(key, [*known]) if known else "it has none"
            raise ValueError(f"strategy: {name} has no setting {key}, {hint}")
        if key in given:
            raise ValueError(f"strategy: {name}: {key} is given twice, give it once")
        given[key] = value
    beside = {key: value for key, value in settings.items() if value is not None and key in known}
    values = {
        key: _read(f"{name}: {key}", value, known[key]) for key, value in (beside | given).items()
    }
    return kind(**values)


def setting_types(kind: type[Strategy]) -> dict[str, Any]:
    """Return the settings of a strategy and their types."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def has_threshold(kind: type[Strategy]) -> bool:
    """Return whether a strategy has a threshold that trades quality for speed."""
    return "threshold" in setting_types(kind)


def describe(strategy: Strategy) -> str:
    """Return the text that `parse_strategy` reads back, with the settings not at their defaults."""
    return ":".join([strategy.name, *(f"{n}={value}" for n, value in _settings(strategy).items())])


def shorten(text: str) -> str:
    """Return what `describe` returned, "..." in place of the settings that were measured."""
    strategy = parse_strategy(text)
    settings = _settings(strategy)
    kept = [f"{n}={value}" for n, value in settings.items() if n not in strategy.measured]
    return ":".join([strategy.name, *kept, *["..."] * (len(kept) < len(settings))])


def _settings(strategy: Strategy) -> dict[str, str]:
    """Return the settings that are not at their defaults, as text."""
    values = {field.name: getattr(strategy, field.name) for field in fields(strategy)}
    defaults = {field.name: field.default for field in fields(strategy)}
    return {name: _write(value) for name, value in values.items() if value != defaults[name]}


def _write(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(str(number).replace("e+", "e") for number in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _read(what: str, text: str, kind: Any) -> object:
    """Read a value of type `kind`, which may be a union with None.

    Raises:
        ValueError: It cannot be read.
    """
    if isinstance(kind, types.UnionType):
        if text == "none":
            return None
        [kind] = [part for part in get_args(kind) if part is not types.NoneType]
    try:
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                raise ValueError
            return text
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            return tuple(_number(part, item) for part in text.split("+") if part)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return _number(text, kind) if kind in (int, float) else read_path(text)
    except (ValueError, KeyError):
        raise ValueError(f"strategy: {what}={text}, give {_kind_in_words(kind)}") from None


def _number(text: str, kind: type[int] | type[float]) -> int | float:
    """Read a number that a tensor can hold.

    Raises:
        ValueError: It cannot be read, or is too large.
    """
    value = kind(text)
    largest = 2**63 - 1 if kind is int else _LARGEST_FLOAT
    if abs(value) > largest and value not in (math.inf, -math.inf):
        raise ValueError
    return value


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_kind_in_words(get_args(kind)[0])}; several are joined by +"
    words = {
        int: "an integer of at most 64 bits",
        float: f"a number up to {_LARGEST_FLOAT}, or inf",
        bool: "true or false",
    }
    return words.get(kind, "a value")
