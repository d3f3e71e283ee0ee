"""Which strategy decodes: the one asked for, the one tuned for the checkpoint, or plain decoding.

Without a measurement of the checkpoint nothing but plain decoding is sure not to be slower than it.
"""

from inference.engine.strategy import Strategy
from inference.loading.quantized import bits_of
from inference.loading.run import Run
from inference.loading.tuned import conditions_of, read_tuned, tuned_path
from inference.strategies.registry import STRATEGIES, has_threshold, parse_strategy

DEFAULT = "autoregressive"
WITH_SETTINGS = "self_speculative"
"""What E or d alone means."""


def choose_strategy(
    run: Run,
    asked: str | Strategy | None,
    *,
    batch_size: int = 1,
    E: str | None = None,
    d: str | None = None,
) -> tuple[Strategy, str]:
    """Return the strategy to decode with, and a line on how it was chosen where nobody named it.

    Args:
        run: The checkpoint.
        asked: A strategy, or one as a user writes it: a name alone takes the threshold that was
            tuned for it. None: the fastest lossless one that was tuned, or else plain decoding.
        batch_size: Rows that will be decoded at once.
        E: Layers run before the exit, as text, for strategies that have such a setting; E or d
            without a strategy means self_speculative.
        d: Tokens drafted in a round, likewise.

    Raises:
        ValueError: There is no such strategy, or what was tuned cannot be used.
    """
    n_layers = run.model.config.n_layers
    if isinstance(asked, Strategy):
        return asked.with_defaults(n_layers), ""
    if asked is None and (E is not None or d is not None):
        asked = WITH_SETTINGS
    tuned, note = _tuned(run, asked, batch_size)
    if tuned is None and asked is None:
        note = (
            f"strategy: {DEFAULT}, plain decoding; python -m inference.tune --run {run.checkpoint}"
            " finds the fastest for this checkpoint"
        )
    strategy = parse_strategy(tuned or (DEFAULT if asked is None else asked), E=E, d=d)
    return strategy.with_defaults(n_layers), note


def _tuned(run: Run, asked: str | None, batch_size: int) -> tuple[str | None, str]:
    """Return the tuned strategy, None if there is none, and a line on it."""
    if asked is not None and not (asked in STRATEGIES and has_threshold(STRATEGIES[asked])):
        return None, ""
    tuned = read_tuned(run, asked)
    if tuned is None or tuned.strategy is None:
        return None, ""
    try:
        parse_strategy(tuned.strategy).validated(run.model.config.n_layers)
    except ValueError as error:  # it is of another version
        remedy = f"delete {tuned_path(run)} or run inference.tune"
        raise ValueError(f"tuned: {tuned.strategy} cannot be used ({error}), {remedy}") from None
    note = f"strategy, tuned for this checkpoint: {tuned.strategy}"
    now = conditions_of(run, batch_size=batch_size, quantize=bits_of(run.model))
    if others := tuned.conditions.differences(now):
        note += f", but with {', '.join(others)}: tune again to know what is best here"
    return tuned.strategy, note
