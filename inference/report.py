"""A report of a run, one HTML file and its pictures: `python -m inference.report --run DIR`."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.command_line import run_command
from data.dataset import VALIDATION
from data.urls import Location, is_url
from inference.cli.arguments import Count, Folder, OutputFile
from inference.cli.terminal import report_line
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from inference.evaluation.exit_traces import record_predictions
from inference.evaluation.measurement import AUTOREGRESSIVE, Workload
from inference.evaluation.prompts import PromptOptions, prompt_set_from
from inference.loading.machine import machine
from inference.loading.run import Run, load_run
from inference.report_page.exits import exits_section
from inference.report_page.measurements import Arms, Tuning
from inference.report_page.measuring import measure_speeds
from inference.report_page.metrics_log import LOG, read_losses
from inference.report_page.opening import find_arms, find_exits, find_tuning, reports_folder
from inference.report_page.origins import decode_with_origins
from inference.report_page.overview import best_lossless, facts, lead_line, machine_section
from inference.report_page.page import Section, note, page
from inference.report_page.source import OWN, Source, date_of, file_date, machine_line
from inference.report_page.speed import rounds_section, speed_section
from inference.report_page.strategies import drafts_section, strategies_section
from inference.report_page.tokens import tokens_section
from inference.report_page.training import Logged, training_section
from inference.report_page.visible import TokenTexts
from inference.report_page.writing import write_report
from inference.strategies.registry import parse_strategy
from inference.strategies.self_speculative import SelfSpeculative


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PromptOptions):
    """Make a report of a run: one HTML file that opens from disk, and its pictures as PNG.

    What was measured before is read: reports/exits.json (inference.evaluate --json),
    reports/speed.json (inference.benchmark --json), and what inference.tune keeps beside the
    checkpoint. All else is measured now. Further runs, such as a dense baseline, are drawn beside
    the first: their losses and exits.

    Example:
      python -m inference.report --run outputs/demo
    """

    run: tuple[Folder, ...]
    """Run folder (its newest checkpoint is used) or one checkpoint folder; further ones to compare
    with."""
    output: OutputFile | None = None
    """The page; report.html in the run's folder reports if not given. Pictures lie beside it."""
    benchmark: Path | None = None
    """A file of inference.benchmark --json to take the strategies from."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and KV cache; float32 on a CPU, bfloat16 on CUDA if not given."""
    prompts: Count = 4
    """Number of prompts, held out or of a task; a --prompt_file gives all its lines."""
    max_new_tokens: Count = 64
    """Most tokens to add to each."""
    max_tokens: Count = 20_000
    """Held-out tokens to measure exits on, where that was not done before."""
    repeats: Count = 3
    """Times strategies are measured, where that was not done before."""
    grid_tokens: Count = 32
    """Tokens of the held-out text to show every exit at."""


@dataclass(frozen=True)
class _Speeds:
    tuning: Tuning | None
    arms: Arms | None
    missing: str = ""
    """Why there are none."""


def report(options: ReportOptions) -> None:
    """Read or measure everything, and write the page and its pictures."""
    runs = [_open(options, i) for i in range(len(options.run))]
    names = _names(runs)
    exits = [
        find_exits(
            run,
            name,
            options.data,
            max_tokens=options.max_tokens,
        )
        for run, name in zip(runs, names, strict=True)
    ]
    run = runs[0]
    logs = [Logged(name, read_losses(at)) for name, at in zip(names, options.run, strict=True)]
    speeds = _speeds(run, options)
    sources = [_log_source(run, name) for run, name in zip(runs, names, strict=True)]
    sections = [
        training_section(logs, sources),
        exits_section(exits),
        speed_section(speeds.tuning, speeds.arms, speeds.missing),
        strategies_section(speeds.arms, speeds.missing),
        rounds_section(speeds.tuning, speeds.missing),
        drafts_section(speeds.arms, speeds.missing),
        _tokens(run, options, speeds),
        machine_section(
            [
                (name, f"{r.checkpoint}, step {r.manifest.step}")
                for name, r in zip(names, runs, strict=True)
            ],
            machine(),
            f"{OWN} {shlex.join(sys.argv[1:])}",
            run.manifest.versions,
        ),
    ]
    html = page(names[0], lead_line(run, logs[0].log), facts(exits[0], speeds.arms), sections)
    path = options.output or _default_output(options.run[0], run)
    folder = write_report(path, html, sections)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB; its pictures: {folder}")


def _open(options: ReportOptions, i: int) -> Run:
    report_line(f"opening {options.run[i]}")
    return load_run(options.run[i], device=options.device, dtype=options.dtype)


def _default_output(named: Location, run: Run) -> Path:
    """Return the page in the run's reports; of a run by URL, whose copy is no one's, here."""
    return (
        Path("report.html")
        if is_url(str(named))
        else reports_folder(run.checkpoint) / "report.html"
    )


def _log_source(run: Run, name: str) -> Source:
    log = reports_folder(run.checkpoint).parent / LOG
    date = file_date(log) if log.is_file() else ""
    return Source("torchrun train/main.py", f"read from {LOG} of {name}, one run", date=date)


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names; where two would be the same, with their folders."""
    names = [run.manifest.setting("name", str, run.checkpoint.name)[:80] for run in runs]
    if len({*names}) == len(names):
        return names
    return [f"{i}: {run.checkpoint}"[:80] for i, run in enumerate(runs, start=1)]


def _prompts(run: Run, options: ReportOptions) -> list[list[int]]:
    """Return the prompts, each short enough to be continued by a token and a draft.

    Raises:
        ValueError: There are none.
    """
    prompts = prompt_set_from(run, options).prompts
    return [
        prompt[-max(1, run.model.config.max_seq_len - options.max_new_tokens) :]
        for prompt in prompts
    ]


def _named_prompts(options: ReportOptions) -> bool:
    return any(each is not None for each in (options.data, options.prompt_file, options.task))


def _speeds(run: Run, options: ReportOptions) -> _Speeds:
    """Read or measure costs and strategies."""
    tuning, arms = find_tuning(run), find_arms(run, options.benchmark)
    L = run.model.config.n_layers
    if arms is not None and (tuning is not None or L == 1):
        return _Speeds(tuning, arms)
    try:
        prompts = _prompts(run, options)
    except ValueError as error:
        if _named_prompts(options):
            raise
        return _Speeds(tuning, arms, f"Not measured: {error}, or --prompt_file.")
    workload = Workload(
        prompts=prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=1,
        sampling=Sampling(),
        seed=0,
        stop_tokens=options.stop_tokens(run),
    )
    new_tuning, new_arms = measure_speeds(run, workload, repeats=options.repeats, tuning=tuning)
    missing = "A model of 1 layer has no exit before its last." if L == 1 else ""
    return _Speeds(tuning or new_tuning, arms or new_arms, missing)


def _tokens(run: Run, options: ReportOptions, speeds: _Speeds) -> Section:
    """Follow a held-out text, or the greedy continuation of a prompt of the user's."""
    try:
        prompt = _prompts(run, options)[0]
    except ValueError as error:
        return Section("tokens", "Token by token", note(f"Not shown: {error}, or --prompt_file."))
    report_line("following a held-out text through the exits")
    decoded = [
        decode_with_origins(run, prompt, strategy, options.max_new_tokens)
        for strategy in _shown(run, speeds)
    ]
    following = [token.token for token in decoded[0].tokens]
    held_out = options.prompt_file is None and options.task is None
    if held_out:
        stream = run.open_data(options.data).stream(VALIDATION)
        room = run.model.config.max_seq_len - len(prompt)
        following = stream.read(len(prompt), min(room, options.grid_tokens)).tolist()
    following = following[: options.grid_tokens]
    here = machine()
    predicted = record_predictions(run.model, [*prompt, *following], len(prompt))
    return tokens_section(
        run.tokenizer.decode(prompt),
        TokenTexts(run.tokenizer),
        following,
        predicted,
        decoded,
        Source(OWN, "one run, greedy", machine_line(here), date_of(here)),
        held_out=held_out,
    )


def _shown(run: Run, speeds: _Speeds) -> list[Strategy]:
    """Return the strategies to follow: the best plain drafts, and the best of all."""
    L = run.model.config.n_layers
    if L == 1:
        return [AUTOREGRESSIVE]
    plain = SelfSpeculative(d=4)
    if speeds.tuning is not None:
        best = speeds.tuning.predictions[0]
        plain = SelfSpeculative(E=best.E, d=max(2, best.d))
    found: list[Strategy] = [plain.with_defaults(L), SelfSpeculative(E=plain.E, d=6, ngram=2)]
    if (arm := best_lossless(speeds.arms)) is not None:
        with suppress(ValueError):  # a file's, of another model
            found.append(parse_strategy(arm.settings).validated(L))
    return [*dict.fromkeys(strategy.with_defaults(L) for strategy in found)]


def main() -> None:
    run_command(ReportOptions, report, prog="python -m inference.report")


if __name__ == "__main__":
    main()
