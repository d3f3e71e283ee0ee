"""Command lines from frozen dataclasses: each documented field is an option; errors are one line.

The lowest file that every command may import, so that options, suggestions and errors are the same
in `train`, `inference`, `data` and `models`. Imports no other file of ours.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import dropwhile
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")

_WIDTH = "9999"
_WORDS = {bool: "True or False", int: "an integer", float: "a number"}
_NUMBERS = {
    r"invalid literal for int\(\) with base 10: '(.*?)'?": "an integer",
    r"could not convert string to float: '(.*?)'?": "a number",
}


def read_options(
    kind: type[T],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    synonyms: Mapping[str, str] | None = None,
    show: bool = True,
) -> T:
    """Return what a command line asks for.

    Args:
        kind: A frozen dataclass; its fields are the options, their docstrings the help.
        words: The command line without the program's name.
        prog: How the command is called.
        description: What it does, shown above the options.
        default: Values of the options that are not given; those of `kind` if None.
        synonyms: {what people type for an option: the option, or what to do instead}, both without
            the dashes.
        show: Whether this process may print help.

    Raises:
        ValueError: An option is missing, unknown or cannot be read; one line.
        SystemExit: After --help; where `show` is False also where ValueError is raised otherwise.
    """
    options, unknown = read_known_options(
        kind, words, prog=prog, description=description, default=default, show=show
    )
    if unknown:
        raise ValueError(_unknown(unknown, [*option_names(kind)], synonyms or {}))
    return options


def read_known_options(
    kind: type[T],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    show: bool = True,
) -> tuple[T, list[str]]:
    """Read a command line as `read_options` does; return also the words that are no options."""
    box = io.StringIO()
    try:
        wide = nullcontext() if {"-h", "--help"} & {*words} else _wide_terminal()
        with redirect_stderr(box), wide:
            options, unknown = tyro.cli(
                kind,
                prog=prog,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=words,
                use_underscores=True,
                console_outputs=show,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code or not show:
            raise
        raise ValueError(_one_line(box.getvalue(), kind)) from None
    return options, unknown


def run_command(
    kind: type[T],
    command: Callable[[T], None],
    *,
    prog: str,
    description: str,
    synonyms: Mapping[str, str] | None = None,
) -> None:
    """Run a command on its options; a user's error becomes one line on stderr and exit code 2."""
    try:
        command(
            read_options(kind, sys.argv[1:], prog=prog, description=description, synonyms=synonyms)
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def option_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the options of a dataclass by name, nested ones as section.field."""
    for name, hint in _hints(kind):
        inner = _plain(hint)
        renamed = _renamed(hint, name)
        if is_dataclass(inner) and isinstance(inner, type):
            yield from option_names(inner, f"{prefix}{renamed}." if renamed else prefix)
        else:
            yield prefix + renamed


def suggest(
    name: str,
    known: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    *,
    prefix: str = "",
) -> str:
    """Return a hint at what `name` was meant to be.

    Args:
        name: What was typed.
        known: All that exists.
        synonyms: {what people type: one of `known`, or what to do instead}.
        prefix: Of all these names, where they are written in the hint.
    """
    near = _nearest(name, known, synonyms or {})
    if near and near[0] not in known:
        return near[0]
    names = [prefix + other for other in near or known]
    if near:
        return f"did you mean {'one of ' if len(names) > 1 else ''}{', '.join(names)}?"
    return f"give one of {', '.join(names)}" if len(names) < 20 else "see --help"


def _nearest(name: str, known: Sequence[str], synonyms: Mapping[str, str]) -> list[str]:
    """Return what is meant by `name`: one or several of `known`, or the entry of a synonym.

    A word that ends the name of an option, as in `lr` for `optim.lr`, means that one.
    """
    if name in synonyms:
        return [synonyms[name]]
    section, _, last = name.rpartition(".")
    if section and (near := get_close_matches(name, known, n=1, cutoff=0.8)):
        return near
    if near := get_close_matches(last, synonyms, n=1, cutoff=0.9):
        return [synonyms[near[0]]]
    tails = {option.rpartition(".")[2]: option for option in reversed(known)}
    if last in tails:
        return [option for option in known if option.rpartition(".")[2] == last]
    near = get_close_matches(name, known, n=1)
    return near or [tails[tail] for tail in get_close_matches(last, tails, n=1)]


def _unknown(words: Sequence[str], known: Sequence[str], synonyms: Mapping[str, str]) -> str:
    """Return the error for words that are no option, of which the first decides."""
    word = words[0].split("=")[0]
    if not word.startswith("-"):
        remedy = synonyms.get(word, "put its --option before it, see --help")
        return f"{word}: a value without an option, {remedy}"
    name = word.lstrip("-").replace("-", "_")
    return f"option: {word} does not exist, {suggest(name, known, synonyms, prefix='--')}"


def _one_line(box: str, kind: type) -> str:
    """Return the error in the box that tyro draws around it and the help, as one line."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]  # the first is the title
    lines = [*dropwhile(lambda line: not line.strip("-"), lines)]
    found = re.search(r"(?m)^[│| ] {5}(--|)(\S+)(| .*?) *[│|]?$", box)
    if "Missing from" in box and found:
        dashes, name, metavar = found.groups()
        return f"{name if dashes else name.lower()}: none, give {dashes}{name}{metavar}"
    end = next((i for i, line in enumerate(lines) if not line.strip("─-")), len(lines))
    text = " ".join(lines[:end]).removeprefix("Error parsing ").rstrip(".")
    if found := re.match(r"Missing value for argument '--([^']*)'\. Expected (\d*)", text):
        several = int(found[2] or 0) > 1
        wanted = f"{found[2]} values" if several else _wanted(kind, found[1])
        return f"{found[1]}: {'too few values' if several else 'no value'}, give {wanted}"
    if found := re.match(r"invalid choice '(.*)' for argument '--([^']*)'. Expected one of", text):
        choices = sorted({*re.findall(r"'([^']*)'", text[found.end() :])} - {"None"})
        return f"{found[2]}: {found[1]}, give one of {', '.join(choices)}"
    name, _, reason = text.removeprefix("--").partition(": ")
    for pattern, wanted in _NUMBERS.items():
        if found := re.fullmatch(pattern, reason):
            return f"{name}: {found[1]}, give {wanted}"
    return f"{name}: {reason}" if reason else f"{text}, see --help"


def _wanted(kind: type, option: str) -> str:
    """Return what an option takes, in words."""
    section, _, rest = option.partition(".")
    for name, hint in _hints(kind):
        inner, renamed = _plain(hint), _renamed(hint, name)
        if is_dataclass(inner) and isinstance(inner, type):
            if renamed == section and rest:
                return _wanted(inner, rest)
            if not renamed and option in option_names(inner):
                return _wanted(inner, option)
        elif renamed == option:
            return _WORDS.get(inner, "a value")
    return "a value"


def _hints(kind: type) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind, include_extras=True)
    yield from ((field.name, hints[field.name]) for field in fields(kind))


def _plain(hint: Any) -> Any:
    return _plain(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def _renamed(hint: Any, name: str) -> str:
    """Return the name an option has on the command line, where its annotation gives another."""
    while get_origin(hint) is Annotated:
        for note in get_args(hint)[1:]:
            given = getattr(note, "name", None)
            if isinstance(given, str):
                return given
        hint = get_args(hint)[0]
    return name


@contextmanager
def _wide_terminal() -> Iterator[None]:
    """Keep tyro from breaking long words at the border of the box it draws."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
