"""A batch that prompts join and leave between any two rounds, for as long as a server runs.

`Generation` decodes prompts that are all known at its start; here they come and go. A round runs on
the rows that are taken, rounded up to a power of two, so that one text is as fast as alone.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from inference.engine.counters import Counters
from inference.engine.decoder import Decoder, advancing
from inference.engine.generation import Emission
from inference.engine.in_flight import InFlightRound, cut
from inference.engine.prefill import allocate, prefill_row
from inference.engine.row_draws import RowDraw, RowDraws
from inference.engine.sampling import Sampling
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from models.llama import Llama


@dataclass
class _Row:
    """A text that is being continued."""

    key: int
    draw: RowDraw
    position: int
    """Of the pending token."""
    left: int
    """Tokens that may still be added."""


@dataclass(frozen=True)
class _Front:
    """The first rows of the batch, as the batch of a decoder."""

    state: DecodeState
    run_round: Decoder


class OpenBatch:
    """Rows for texts that come and go.

    Tokens of lossless strategies are a function of a text's own prompt, settings and seed; rows
    move together as others end. Rows of the other strategies stay where they are, and all of them
    are run.

    Args:
        model: In eval mode, on its device; not compiled.
        strategy_for: Strategy for a number of rows; if they are not the same, all lossless.
        rows: Most texts at once.
        slots: Most tokens of a text, prompt and continuation.
        stop_tokens: Ids that end a text; the id itself is its last token.

    Raises:
        ValueError: A strategy does not fit the model.
    """

    def __init__(
        self,
        model: Llama,
        strategy_for: Callable[[int], Strategy],
        *,
        rows: int,
        slots: int,
        stop_tokens: Collection[int] = (),
    ) -> None:
        n_layers = model.config.n_layers
        sizes = [1]
        while sizes[-1] < rows:
            sizes.append(min(2 * sizes[-1], rows))
        found = {n: strategy_for(n).validated(n_layers) for n in sizes}
        self._compact = all(strategy.lossless for strategy in found.values())
        self._strategies = found if self._compact else {rows: found[rows]}
        self._prefill_layers = found[rows].prefill_layers(n_layers)
        self._stop_tokens = frozenset(stop_tokens)
        self._rows: list[_Row | None] = [None] * rows
        self._fronts: dict[int, _Front] = {}
        self._drawn_for: list[_Row | None] = []
        """The rows that the draws of the batch were last made for."""
        self._draws: RowDraws | None = None
        self.counters = Counters()
        """Of everything but the layers of rounds."""
        self._state = allocate(
            model,
            rows,
            slots=slots,
            sampling=Sampling(),
            seed=0,
            spare=max(strategy.spare_slots(slots) for strategy in found.values()),
        )
        self._state.batch.finished.fill_(True)
        for n in self._strategies:
            self._front(n)  # a strategy's own errors come now

    def __len__(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def free(self) -> int:
        """Texts that may join."""
        return len(self._rows) - len(self)

    @property
    def strategy(self) -> Strategy:
        """The strategy of the rows that are taken now."""
        return self._strategies[self._size()]

    @torch.inference_mode()
    def join(self, key: int, prompt: Sequence[int], *, limit: int, draw: RowDraw) -> None:
        """Put a prompt into a free row.

        Args:
            key: Names it in what `round` returns.
            prompt: Token ids, at least one.
            limit: Most tokens to add; with the prompt no more than there are slots.
            draw: How its tokens are drawn.
        """
        row = self._rows.index(None)
        self._state.counters = Counters()
        prefill_row(self._state, row, prompt, self._prefill_layers)
        self.counters.prompt_token_layers += self._state.counters.token_layers
        self._rows[row] = _Row(key, draw, len(prompt) - 1, limit)
        self._mark_new_prompts()

    @torch.inference_mode()
    def leave(self, key: int) -> None:
        """Free the row of a text; its tokens are no longer decoded."""
        for row, taken in enumerate(self._rows):
            if taken is not None and taken.key == key:
                self._park(row)

    @torch.inference_mode()
    def round(self) -> dict[int, Emission]:
        """Decode 1 or more tokens for every text, of which at least one is there; by its key."""
        if self._compact:
            self._close_up()
        front = self._front(self._size())
        state, batch = front.state, front.state.batch
        live = [row for row in self._rows if row is not None]
        batch.max_position = max(row.position for row in live)
        most = min(max(row.left for row in live), state.cache.slots - batch.max_position)
        state.draws, state.counters = self._draws_now(len(batch)), Counters()
        result = InFlightRound(front.run_round(most), [*range(len(batch))])
        return self._read(result)

    def _read(self, result: InFlightRound) -> dict[int, Emission]:
        """Return the tokens of each text, cut at its limit and at a stop token; free such rows."""
        tokens, accepted, drafted, _, _ = result.read()
        found = {}
        for i, row in enumerate(self._rows[: len(tokens)]):
            if row is None:
                continue
            new, kept, tried = cut(tokens[i], accepted[i], drafted[i], row.left, self._stop_tokens)
            found[row.key] = Emission(row.key, new, kept, tried)
            row.position += len(new)
            row.left -= len(new)
            self.counters.tokens += len(new)
            self.counters.rounds += 1
            self.counters.drafted += tried
            self.counters.accepted += kept
            if new[-1] in self._stop_tokens or not row.left:
                self._park(i)
        return found

    def _size(self) -> int:
        """Return the rows of the next round."""
        last = max((i for i, row in enumerate(self._rows) if row is not None), default=0)
        return next(n for n in self._strategies if n > last)

    def _front(self, n: int) -> _Front:
        """Return the first n rows with their decoder, which is started when they first are."""
        if n not in self._fronts:
            batch, cache = self._state.batch.part(slice(n)), self._state.cache.part(slice(n))
            state = replace(self._state, batch=batch, cache=cache, counters=Counters())
            decoder = advancing(batch, self._strategies[n].start(state))
            self._fronts[n] = _Front(state, decoder)
        return self._fronts[n]

    def _close_up(self) -> None:
        """Move the last rows into free ones before them, so that fewer rows are run."""
        while True:
            taken = [i for i, row in enumerate(self._rows) if row is not None]
            hole, last = self._rows.index(None) if self.free else len(self._rows), taken[-1]
            if hole > last:
                return
            moved = self._rows[last]
            assert moved is not None
            self._state.batch.move_row(last, hole)
            self._state.cache.move_row(last, hole, moved.position + 1)
            self._rows[hole] = moved
            self._park(last)
            self._mark_new_prompts()

    def _park(self, row: int) -> None:
        self._rows[row] = None
        self._state.batch.park(row)

    def _mark_new_prompts(self) -> None:
        """Have decoders look at what rows hold now."""
        for front in self._fronts.values():
            front.state.batch.num_prefills += 1

    def _draws_now(self, n: int) -> RowDraws | None:
        """Return the draws of the first n rows."""
        rows = self._rows[:n]
        if [*map(id, rows)] != [*map(id, self._drawn_for)]:
            draws = [None if row is None else row.draw for row in rows]
            self._draws = RowDraws.of(draws, self._state.batch.device)
            self._drawn_for = rows
        return self._draws
