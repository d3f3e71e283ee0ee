"""Which strategy a request is decoded with: the server's own, or one that it names."""

from dataclasses import astuple, fields
from pathlib import Path

from inference.engine.strategy import Strategy
from inference.loading.run import Run
from inference.serving.request_error import RequestError, wrong
from inference.strategies.registry import describe, parse_strategy
from inference.strategies.speculative import check_tokenizer
from inference.text.strategy_choice import choose_strategy

_LONGEST_TEXT = 400
_MOST_KEPT = 256


class NamedStrategies:
    """The strategies of a server.

    Args:
        run: The checkpoint.
        asked: The server's own, as a user writes it; None: for each number of rows the fastest
            lossless one that was tuned for it, or else plain decoding.
        slots: Most tokens of a text.
    """

    def __init__(self, run: Run, asked: str | None, slots: int) -> None:
        self._run, self._asked, self._slots = run, asked, slots
        self._found: dict[str, Strategy] = {}

    def own(self, rows: int) -> Strategy:
        """Return the server's own strategy for so many rows.

        Raises:
            ValueError: There is no such strategy, or it does not fit the checkpoint.
        """
        strategy, _ = choose_strategy(self._run, self._asked, batch_size=rows)
        check_tokenizer(strategy, self._run)
        return strategy.validated(self._run.model.config.n_layers)

    def note(self, rows: int) -> str:
        """Return a line on how the strategy for so many rows was chosen."""
        return choose_strategy(self._run, self._asked, batch_size=rows)[1]

    def named(self, text: str) -> Strategy | None:
        """Return the strategy that a request names; None: it is the server's own.

        Raises:
            RequestError: There is no such strategy, or not for requests.
        """
        if text == self._asked:
            return None
        if text not in self._found:
            if len(self._found) >= _MOST_KEPT:
                self._found.clear()
            self._found[text] = self._read(text)
        return self._found[text]

    def _read(self, text: str) -> Strategy:
        if len(text) > _LONGEST_TEXT:
            raise RequestError(400, f"strategy: give a text of at most {_LONGEST_TEXT} characters")
        try:
            self._refuse_files(parse_strategy(text))
            strategy, _ = choose_strategy(self._run, text)
            check_tokenizer(strategy, self._run)
            strategy = strategy.validated(self._run.model.config.n_layers)
        except ValueError as error:
            message = str(error)
            prefix = "" if message.startswith("strategy: ") else "strategy: "
            raise RequestError(400, prefix + message) from None
        self._refuse_large(text, strategy)
        return strategy

    def _refuse_files(self, strategy: Strategy) -> None:
        """Refuse the files that a strategy may name: a request must not open any here."""
        for field in fields(strategy):
            if isinstance(getattr(strategy, field.name), Path):
                raise wrong("strategy", describe(strategy), "a request cannot name files")

    def _refuse_large(self, text: str, strategy: Strategy) -> None:
        """Refuse settings that would take memory without end."""
        numbers = [value for value in astuple(strategy) if isinstance(value, int)]
        if max([strategy.spare_slots(self._slots), *numbers]) > self._slots:
            raise wrong("strategy", text, f"give smaller numbers: a text has {self._slots} tokens")
