"""Continue a prompt: `python -m inference.generate --run DIR --prompt TEXT --strategy NAME`.

Text goes to stdout as it comes, legend and statistics to stderr.
"""

import os
import sys
import unicodedata
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from data.command_line import run_command
from inference.cli.arguments import DecodingOptions, SamplingOptions
from inference.cli.terminal import write_json
from inference.cli.text_stream import TextStream
from inference.engine.counters import Counters
from inference.engine.generation import Emission, Generation
from inference.loading.run import Run
from inference.loading.tuned import conditions_of, read_tuned, tuned_path
from inference.strategies.registry import STRATEGIES, describe, has_threshold, parse_strategy
from inference.strategies.speculative import check_tokenizer

ACCEPTED, CORRECTED, PLAIN = "accepted", "corrected", "plain"
_COLORS = {ACCEPTED: "\033[32m", CORRECTED: "\033[33m", PLAIN: ""}
_RESET = "\033[0m"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions, DecodingOptions):
    """Continue a prompt and stream the text.

    On a terminal, drafted tokens that were accepted are green, tokens the full model put after them
    yellow.

    Example:
      python -m inference.generate --run outputs/demo --prompt 'Once upon a time'
    """

    prompt: str
    """Text to continue."""
    strategy: Annotated[
        str | None,
        tyro.conf.arg(
            help="The fastest lossless one that inference.tune found, or else self_speculative, if"
            f" not given; name or name:setting=value:setting=value, of {', '.join(STRATEGIES)}; a"
            " name alone takes the threshold that inference.tune found for it."
        ),
    ] = None
    E: str | None = None
    """Layers run before the exit, for early_exit and self_speculative; a quarter if not given."""
    d: str | None = None
    """Tokens drafted per round, for self_speculative; 4 if not given."""
    max_new_tokens: int = 100
    """Most tokens to add; ends earlier at EOS or at the end of the model's context."""


def provenance(emission: Emission) -> list[str]:
    """Say where each token of an emission comes from."""
    rest = len(emission.tokens) - emission.accepted
    return [ACCEPTED] * emission.accepted + [CORRECTED if emission.drafted else PLAIN] * rest


def printable(text: str) -> str:
    """Replace what a terminal would obey: a model may write escape sequences byte by byte."""
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) != "Cc"
        else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def statistics_line(counters: Counters) -> str:
    """Return the counts of a run in one line."""
    line = (
        f"{counters.tokens} tokens, {counters.tokens_per_second:.1f} tokens/s, "
        f"{counters.layers_per_token:.2f} layers/token, prompt {counters.prefill_seconds:.3f} s"
    )
    if counters.acceptance_rate is not None:
        line += (
            f", acceptance {counters.acceptance_rate:.1%}, "
            f"{counters.tokens_per_round:.2f} tokens/verify"
        )
    return line


def stream(
    generation: Generation, text_stream: TextStream, *, on_terminal: bool, colored: bool
) -> tuple[str, list[str]]:
    """Decode to the end, printing the text as it comes.

    Returns:
        The new text, and where each new token comes from.
    """
    text, sources = "", []
    for [emission] in generation:
        for token, source in zip(emission.tokens, provenance(emission), strict=True):
            piece = text_stream.push(token)
            text += piece
            sources.append(source)
            on, off = (_COLORS[source], _RESET) if colored else ("", "")
            print(f"{on}{printable(piece) if on_terminal else piece}{off}", end="", flush=True)
    rest = text_stream.finish()
    print(rest)
    return text + rest, sources


def tuned_for(run: Run, options: GenerateOptions) -> tuple[str | None, str]:
    """Return the tuned strategy the arguments ask for, None if there is none, and a note on it.

    Raises:
        ValueError: what was tuned cannot be used.
    """
    tuned = None
    if options.strategy is None and options.E is None and options.d is None:
        tuned = read_tuned(run, None)
    elif (kind := STRATEGIES.get(options.strategy or "")) and has_threshold(kind):
        tuned = read_tuned(run, options.strategy)
    if tuned is None or tuned.strategy is None:
        return None, ""
    try:
        parse_strategy(tuned.strategy).validated(run.model.config.n_layers)
    except ValueError as error:  # it is of another version
        remedy = f"delete {tuned_path(run)} or run inference.tune"
        raise ValueError(f"tuned: {tuned.strategy} cannot be used ({error}), {remedy}") from None
    note = f"strategy, tuned for this checkpoint: {tuned.strategy}"
    now = conditions_of(run, batch_size=1, quantize=options.quantize)
    if others := tuned.conditions.differences(now):
        note += f", but with {', '.join(others)}: tune again to know what is best here"
    return tuned.strategy, note


def generate(options: GenerateOptions) -> None:
    """Run the command."""
    run = options.open_run()
    tuned, note = tuned_for(run, options)
    asked = "self_speculative" if options.strategy is None else options.strategy
    text = asked if tuned is None else tuned
    strategy = parse_strategy(text, E=options.E, d=options.d).with_defaults(
        run.model.config.n_layers
    )
    check_tokenizer(strategy, run)
    if any("\ud800" <= char <= "\udfff" for char in options.prompt):
        raise ValueError("prompt: not valid UTF-8, give text")
    prompt = [run.tokenizer.bos_id, *run.tokenizer.encode(options.prompt)]
    generation = Generation(
        run.model,
        [prompt],
        strategy,
        max_new_tokens=options.max_new_tokens,
        stop_tokens=[run.tokenizer.eos_id],
        sampling=options.sampling,
        seed=options.seed,
        graphs=run.graphs,
    )
    if tuned is not None:
        print(note, file=sys.stderr)
    on_terminal = sys.stdout.isatty()
    colored = on_terminal and "NO_COLOR" not in os.environ
    print(options.prompt, end="", flush=True)
    text_stream = TextStream(run.tokenizer, prompt)
    text, sources = stream(generation, text_stream, on_terminal=on_terminal, colored=colored)
    if colored:
        legend = (ACCEPTED, CORRECTED) if generation.counters.drafted else (PLAIN,)
        print(*(f"{_COLORS[source]}{source}{_RESET}" for source in legend), file=sys.stderr)
    print(statistics_line(generation.counters), file=sys.stderr)
    result = {
        "checkpoint": str(run.checkpoint),
        "strategy": describe(strategy),
        "sampling": asdict(options.sampling),
        "seed": options.seed,
        "prompt": options.prompt,
        "text": text,
        "tokens": generation.tokens[0],
        "provenance": sources,
        "counters": generation.counters.content(),
    }
    write_json(options.json, result)


def main() -> None:
    """Enter from the command line."""
    run_command(GenerateOptions, generate, prog="python -m inference.generate")


if __name__ == "__main__":
    main()
