"""Command lines from frozen dataclasses: each documented field is an option; errors are one line.

The lowest file that every command may import, so that options, suggestions and errors are the same
in `train`, `inference`, `data` and `models`. Of our files it imports `command_help`,
`option_values`, `output_streams` and `suggestion` alone.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import fields, is_dataclass
from itertools import dropwhile
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from data.command_help import JOINED_HELP, called_as, paragraphs
from data.option_values import REGISTRY
from data.output_streams import ending_as_a_command
from data.suggestion import suggest

T = TypeVar("T")

_WIDTH = "9999"
_POSITIONAL = get_args(tyro.conf.Positional[str])[1]
_WORDS = {int: "an integer", float: "a number"}
_NUMBERS = {
    r"invalid literal for int\(\) with base 10: '(.*?)'?": "an integer",
    r"could not convert string to float: '(.*?)'?": "a number",
}


def read_options(
    kind: type[T],
    words: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: T | None = None,
    synonyms: Mapping[str, str] | None = None,
    show: bool = True,
) -> T:
    """Return what a command line asks for.

    Args:
        kind: A frozen dataclass; its fields are the options, their docstrings the help. A field
            marked tyro.conf.Positional is given without its name.
        words: The command line without the program's name.
        prog: How the command is called.
        description: What it does, shown above the options; the docstring of `kind` if None.
        default: Values of the options that are not given; those of `kind` if None.
        synonyms: {what people type for an option: the option, or what to do instead}, both without
            the dashes.
        show: Whether this process may print help.

    Raises:
        ValueError: An option is missing, unknown or cannot be read; one line.
        SystemExit: After --help; where `show` is False also where ValueError is raised otherwise.
    """
    try:
        options, unknown = read_known_options(
            kind, words, prog=prog, description=description, default=default, show=show
        )
    except ValueError as error:  # perhaps since a mistyped option hides one that is required
        known = {*option_names(kind)}
        unknown = [word for word in words if word[:2] == "--" and _typed(word) not in known]
        raise ValueError(
            _unknown(unknown, kind, synonyms or {}) if unknown else str(error)
        ) from None
    if unknown:
        raise ValueError(_unknown(unknown, kind, synonyms or {}))
    return options


def read_known_options(
    kind: type[T],
    words: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    default: T | None = None,
    show: bool = True,
) -> tuple[T, list[str]]:
    """Read a command line as `read_options` does; return also the words that are no options."""
    box = io.StringIO()
    try:
        wide = nullcontext() if {"-h", "--help"} & {*words} else _wide_terminal()
        with redirect_stderr(box), wide, JOINED_HELP:
            options, unknown = tyro.cli(
                kind,
                prog=prog,
                description=paragraphs(kind) if description is None else description,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=words,
                use_underscores=True,
                console_outputs=show,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
                registry=REGISTRY,
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
    description: str | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> None:
    """Run a command on its options; a user's error becomes one line on stderr and exit code 2.

    SIGINT and SIGTERM end it with one line too, after files that are half written are removed.
    """
    with ending_as_a_command():
        command(
            read_options(
                kind,
                sys.argv[1:],
                prog=called_as(prog),
                description=description,
                synonyms=synonyms,
            )
        )


def option_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the options of a dataclass by name, nested ones as section.field."""
    for name, hint in _hints(kind):
        if _POSITIONAL in get_args(hint):
            continue
        inner = _plain(hint)
        renamed = _renamed(hint, name)
        if is_dataclass(inner) and isinstance(inner, type):
            yield from option_names(inner, f"{prefix}{renamed}." if renamed else prefix)
        else:
            yield prefix + renamed


def _typed(word: str) -> str:
    """Return the option that a word such as --seq-len=512 names, without its dashes."""
    return word.split("=")[0].lstrip("-").replace("-", "_")


def _unknown(words: Sequence[str], kind: type, synonyms: Mapping[str, str]) -> str:
    """Return the error for words that are no option, of which the first decides."""
    word = words[0].split("=")[0]
    if not word.startswith("-"):
        remedy = synonyms.get(word, "put its --option before it, see --help")
        return f"{word}: a value without an option, {remedy}"
    hint = suggest(_typed(word), [*option_names(kind)], synonyms, prefix="--")
    return f"option: {word} does not exist, {hint}"


def _one_line(box: str, kind: type) -> str:
    """Return the error in the box that tyro draws around it and the help, as one line."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]  # the first is the title
    lines = [*dropwhile(lambda line: not line.strip("-"), lines)]
    found = re.search(r"(?m)^[│| ] {5}(--|)(\S+)(| .*?) *[│|]?$", box)
    if "Missing from" in box and found:
        dashes, name, metavar = found.groups()
        return f"{name if dashes else name.lower()}: none, give {dashes}{name}{metavar}"
    end = next((i for i, line in enumerate(lines) if not line.strip("─-")), len(lines))
    text = " ".join(lines[:end]).rstrip(".")
    if found := re.match(r"Error parsing (\S+)", text):  # a word without an option: by its field
        name = found[1] if found[1].startswith("--") else found[1].lower()
        text = name + text[found.end() :]
    text = text.removeprefix(f"{kind.__name__}: ")  # raised by the class itself
    if found := re.match(r"Missing value for argument '--([^']*)'\. Expected (\d*)", text):
        several = int(found[2] or 0) > 1
        wanted = f"{found[2]} values" if several else _wanted(kind, found[1])
        return f"{found[1]}: {'too few values' if several else 'no value'}, give {wanted}"
    if found := re.match(r"invalid choice '(.*)' for argument '--([^']*)'. Expected one of", text):
        choices = sorted({*re.findall(r"'([^']*)'", text[found.end() :])} - {"None"})
        return f"{found[2]}: {found[1]}, give one of {', '.join(choices)}"
    if found := re.fullmatch(r"--(\S+): Could not find valid parse for arguments: .*''.*", text):
        return f"{found[1]}: empty, name each"
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
