"""Serve a run over HTTP: `python -m inference.serve --run DIR`, then OpenAI's API, or a browser.

The work is in `inference/serving/`. It needs the extra `serve`.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from data.command_line import run_command
from data.option_values import read_as, read_path
from inference.cli.arguments import Count, OpenOptions
from inference.engine.open_batch import OpenBatch
from inference.engine.strategy import Strategy
from inference.loading.run import Run
from inference.strategies.registry import STRATEGIES

_KEY = "SKIPSTONE_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(OpenOptions):
    r"""Serve a run over HTTP, by OpenAI's API for completions, with a page at /.

    Example:
      python -m inference.serve --run outputs/demo
      curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \
        -d '{"prompt": "Once upon a time", "max_tokens": 50, "temperature": 0}'
    """

    host: str = "127.0.0.1"
    """Address to listen at; any other than this machine's own needs a key."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    api_key_file: Annotated[Path, read_as("PATH", read_path)] | None = None
    """File with the key that clients have to send; SKIPSTONE_API_KEY in the environment holds the
    key itself."""
    strategy: Annotated[
        str | None,
        tyro.conf.arg(
            help="The fastest lossless one that inference.tune found for as many rows as are"
            " decoded, or else autoregressive, if not given; name or name:setting=value, of "
            f"{', '.join(STRATEGIES)}. Requests may name others."
        ),
    ] = None
    batch_size: Count = 8
    """Most texts decoded at once."""
    max_queue: Count = 64
    """Most texts that wait; more are refused with status 429."""
    max_context: Count | None = None
    """Most tokens of a text, prompt and continuation; the model's context if not given. Memory is
    taken for so many in each row."""
    model_name: str | None = None
    """What requests call the model; the run's name if not given."""


def read_key(file: Path | None) -> str | None:
    """Return the key of clients, None if there is none.

    Raises:
        ValueError: It cannot be read or used.
    """
    key = os.environ.get(_KEY)
    source = _KEY
    if file is not None:
        if key is not None:
            raise ValueError(f"api_key_file: {file}, and {_KEY} is set too, give one of them")
        source = "api_key_file"
        try:
            key = file.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no text"
            raise ValueError(f"api_key_file: {file} cannot be read ({why})") from None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError(f"{source}: empty or not plain ASCII, give one line of it")
    return key


def serve(options: ServeOptions) -> None:
    """Load the run and serve it until a signal."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"serve: {package} is not installed, pip install -e .[serve]")
    key = read_key(options.api_key_file)
    if key is None and options.host not in _LOOPBACK:
        raise ValueError(
            f"host: {options.host} can be reached by others, give --api_key_file or set {_KEY}"
        )
    run = options.open_run()
    serve_run(options, run, key)


def serve_run(options: ServeOptions, run: Run, key: str | None) -> None:
    """Serve a run that is open."""
    from inference.serving.app import Served, build_app
    from inference.serving.guard import Guard
    from inference.serving.http_server import Server, listen
    from inference.serving.named_strategies import NamedStrategies
    from inference.serving.scheduler import Scheduler

    context = run.model.config.max_seq_len
    slots = options.max_context or context
    if not 2 <= slots <= context:
        raise ValueError(f"max_context: {slots}, give 2 to {context} for this model")
    listening = listen(options.host, options.port)
    strategies = NamedStrategies(run, options.strategy, slots)

    def open_batch(strategy: Strategy | None) -> OpenBatch:
        return OpenBatch(
            run.model,
            strategies.own if strategy is None else partial(_same, strategy),
            rows=options.batch_size,
            slots=slots,
            stop_tokens=run.stop_tokens,
        )

    scheduler = Scheduler(
        open_batch,
        rows=options.batch_size,
        max_queue=options.max_queue,
        on_death=lambda: server.die(),
    )
    name = options.model_name or run.manifest.setting("name", str, None) or "skipstone"
    app = build_app(
        Served(run=run, name=name, slots=slots, strategies=strategies, scheduler=scheduler)
    )
    guard = Guard(app, key, {*_LOOPBACK, options.host}, scheduler.metrics.refused)
    server = Server(guard, scheduler)
    for note in dict.fromkeys((strategies.note(1), strategies.note(options.batch_size))):
        if note:
            print(note, file=sys.stderr)
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"serving {name} at http://{shown}:{port}", flush=True)
    scheduler.start()
    server.serve_on(listening)


def _same(strategy: Strategy, rows: int) -> Strategy:
    return strategy


def main() -> None:
    run_command(ServeOptions, serve, prog="python -m inference.serve")


if __name__ == "__main__":
    main()
