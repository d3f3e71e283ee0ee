"""Reads the commands of a block without running them, each with the parser it would meet."""

import configparser
import importlib
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest import mock

from torch.distributed.run import get_args_parser

from data import command_line
from inference.strategies.registry import parse_strategy
from tests.docs.pages import ROOT
from train import sweep
from train.config import command_line as training
from train.config.demos import demo

# Programs whose options are not ours.
OTHERS = (
    *("cat", "cp", "curl", "git", "gzip", "head", "ls", "mkdir", "moto_server", "mypy", "pgrep"),
    *("pre-commit", "rm", "ruff", "sleep", "tail", "tensorboard", "trackio"),
    *("llama-server", "transformers", "vllm"),
)
# Finds no program, so that the shell hands over the words of each one it would start.
_RECORDER = """
PATH=/nowhere
command_not_found_handle() { printf '%s\\0' "$#" "$@" >&3; }
source() { :; }
kill() { :; }
"""


class ParsedError(BaseException):
    """Raised where the options of a command have been read, to go no further."""


def words_of(block, folder):
    """Return the words of every program that a bash block starts, as the shell expands them."""
    record = folder / "words"
    (folder / "outputs").mkdir()
    script = f"exec 3>{record}\n{_RECORDER}{block.text}"
    done = subprocess.run(["bash", "-eu", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    words, commands = iter(record.read_text().split("\0")[:-1]), []
    for count in words:
        commands.append([next(words) for _ in range(int(count))])
    return commands


def parse_command(words):
    """Parse one command; an error of its user is raised, as ValueError or SystemExit."""
    program, *rest = words
    if program == "torchrun":
        options = get_args_parser().parse_args(rest)
        parse_script(options.training_script, options.training_script_args, options.nproc_per_node)
    elif program == "sbatch":
        script = rest.index("launch/train.slurm")
        assert all(word.startswith("--") for word in rest[:script])
        parse_script("train/main.py", rest[script + 1 :])
    elif program in ("python", "python3") and rest[0] == "-m":
        parse_module(rest[1], rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program == "python" and rest == ["-"]:
        pass  # A program that the block itself writes out.
    elif program == "python" and rest[0].startswith("llama.cpp/"):
        pass  # Of another project's clone.
    elif program == "python":
        parse_script(rest[0], rest[1:])
    elif program == "skipstone":
        parse_verb(rest[0], rest[1:])
    elif program == "pip":
        parse_install(rest)
    elif program == "bash" and rest[0] == "launch/prepare.slurm":
        parse_module("data.prepare", rest[1:])
    elif program in ("bash", "pytest"):
        check_paths(rest)
    else:
        assert program in OTHERS, f"{program}: unknown to the tests of the documentation"


def parse_script(path, words, ranks=None):
    """Parse the options of a script; training must be possible on so many ranks.

    A file that --config names may not be there yet: the demo stands in for it.
    """
    if path == "train/main.py":
        no_file = mock.patch.object(training, "read_config", lambda _, base: base or demo())
        no_fields = mock.patch.object(training, "given_fields", return_value=set())
        with no_file, no_fields, redirect_stdout(StringIO()):
            command = training.parse(words, show=True)
        if ranks is not None:
            command.config.check(int(ranks))
        return
    parse_main(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"), [path, *words])


def parse_module(name, words):
    """Parse the options of `python -m name`."""
    if name == "pytest":
        check_paths(words)
    elif name == "train.main":
        parse_script("train/main.py", words)
    elif name != "venv":
        parse_main(importlib.import_module(name).main, [name, *words])


def parse_verb(verb, words):
    """Parse the options of `skipstone verb`; those of torchrun come before a preset."""
    if verb == "train":
        while words and words[0].startswith(("--nproc", "--nnodes")):
            words = words[1:]
        parse_script("train/main.py", words)
    elif verb != "--help":
        parse_module(importlib.import_module("launch.main").VERBS[verb][0], words)


def parse_main(main, words):
    """Call a command's main up to where its options are read; strategies in them are read too."""
    read_options = command_line.read_options

    def read(*args, **kwargs):
        raise ParsedError(read_options(*args, **kwargs))

    def stop(*_):
        raise ParsedError(None)

    said = StringIO()
    with (
        mock.patch.multiple(sweep, train=stop, submit=stop, report=stop),
        mock.patch.object(command_line, "read_options", read),
        mock.patch.object(sys, "argv", words),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        try:
            status = main()
        except ParsedError as parsed:
            check_strategies(parsed.args[0])
            return
        except SystemExit as stop:
            status = stop.code
    assert not status, f"{' '.join(words)}: {said.getvalue()}"


def check_strategies(options):
    """Read the strategies among the options of a command."""
    for text in (getattr(options, "strategy", None), *getattr(options, "strategies", ())):
        if text is not None:
            parse_strategy(text)


def parse_install(words):
    """Check that what `pip install` names is there: files, and extras of ours."""
    setup = read_setup()
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert setup.has_option("options.extras_require", extra), extra
    check_paths(words)


def read_setup():
    """Return the contents of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def check_paths(words):
    """Check that the files among some words are there."""
    for word in words:
        if re.search(r"\.(py|sh|txt|slurm)\b", word):
            assert (ROOT / word.split("::")[0]).is_file(), word
