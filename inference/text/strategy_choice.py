"""Which strategy decodes: the one asked for, the one tuned for the checkpoint, or plain decoding.

Without a measurement of the checkpoint nothing but plain decoding is sure not to be slower than it.
"""

import shlex

from inference.engine.strategy import Strategy
from inference.loading.quantized import bits_of
from inference.loading.run import Run
from inference.loading.tuned import Conditions, conditions_of, read_tuned, tuned_path
from inference.strategies.registry import (
    STRATEGIES,
    describe,
    has_threshold,
    parse_strategy,
    setting_types,
    shorten,
)

DEFAULT = "autoregressive"
WITH_SETTINGS = "self_speculative"
"""What E or d alone means."""


def choose_strategy(
    run: Run,
    asked: str | Strategy | None,
    *,
    batch_size: int = 1,
    temperature: float = 0.0,
    E: str | None = None,
    d: str | None = None,
) -> tuple[Strategy, str]:
    """Return the strategy to decode with, and a line on how it was chosen where nobody named it.

    Args:
        run: The checkpoint.
        asked: A strategy, or one as a user writes it: a name alone takes the threshold that was
            tuned for it. None: the fastest lossless one that was tuned under these conditions, or
            else plain decoding.
        batch_size: Rows that will be decoded at once.
        temperature: Of sampling; 0 is greedy.
        E: Layers run before the exit, as text, for strategies that have such a setting; E or d
            without a strategy means self_speculative.
        d: Tokens drafted in a round, likewise.

    Raises:
        ValueError: There is no such strategy, or what was tuned cannot be used.
    """
    n_layers = run.model.config.n_layers
    if isinstance(asked, Strategy):
        return asked.with_defaults(n_layers), ""
    given = {name: value for name, value in (("E", E), ("d", d)) if value is not None}
    if asked is None and given:
        strategy = parse_strategy(WITH_SETTINGS, **given).with_defaults(n_layers)
        return strategy, f"strategy: {describe(strategy)}"
    if given and asked is not None and (kind := STRATEGIES.get(asked.partition(":")[0])):
        for name in given.keys() - setting_types(kind):
            raise ValueError(f"{name}: {given[name]}, but {kind.name} has none, leave it out")
    now = conditions_of(
        run, batch_size=batch_size, quantize=bits_of(run.model), temperature=temperature
    )
    tuned, note = _tuned(run, asked, now)
    if not note and asked is None:
        note = (
            f"strategy: {DEFAULT}, plain decoding; python -m inference.tune --run "
            f"{shlex.quote(str(run.checkpoint))} finds the fastest for this checkpoint"
        )
    strategy = parse_strategy(tuned or (DEFAULT if asked is None else asked), **given)
    return strategy.with_defaults(n_layers), note


def _tuned(run: Run, asked: str | None, now: Conditions) -> tuple[str | None, str]:
    """Return the tuned strategy, None if there is none, and a line on it.

    The fastest lossless one may be slower than plain decoding under other conditions than it was
    tuned under, and is left out there.
    """
    if asked is not None and not (asked in STRATEGIES and has_threshold(STRATEGIES[asked])):
        return None, ""
    tuned = read_tuned(run, asked, now)
    if tuned is None or tuned.strategy is None:
        return None, ""
    try:
        parse_strategy(tuned.strategy).validated(run.model.config.n_layers)
    except ValueError as error:  # it is of another version
        remedy = f"delete {tuned_path(run)} or run inference.tune"
        raise ValueError(f"tuned: {tuned.strategy} cannot be used ({error}), {remedy}") from None
    others, short = ", ".join(tuned.conditions.differences(now)), shorten(tuned.strategy)
    if not others:
        return tuned.strategy, f"strategy, tuned for this checkpoint: {short}"
    if asked is None:
        return None, (
            f"strategy: {DEFAULT}, plain decoding; {short} was tuned with {others}, tune again for"
            " these"
        )
    note = f"strategy, tuned for this checkpoint: {short}, but with {others}"
    return tuned.strategy, f"{note}: tune again to know what is best here"
