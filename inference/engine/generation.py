"""The decoding loop: prompts in, rounds of tokens out, for any strategy. Works on token ids."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from inference.engine.counters import Counters, DraftedRound, StopReason
from inference.engine.cuda_graphs import GraphedBatch, RoundGraphs
from inference.engine.decoder import advancing
from inference.engine.in_flight import InFlightRound, cut
from inference.engine.prefill import allocate, prefill, prefill_row
from inference.engine.sampling import Sampling
from inference.engine.strategy import Strategy
from models.config import LlamaConfig
from models.llama import Llama


@dataclass(frozen=True)
class Emission:
    """The tokens that one round added to one prompt."""

    prompt_index: int
    """Index of the prompt, in the order they were given."""
    tokens: list[int]
    """At least one; none after a stop token or beyond the row's limit."""
    accepted: int
    """How many of them, from the first, were drafted and accepted."""
    drafted: int
    """Tokens drafted in this round, up to the row's end if it ended among the accepted ones. 0: the
    tokens were decoded without a draft. Otherwise a token after the accepted ones corrects the
    draft, or follows a draft that was accepted whole."""


class Generation:
    """The continuation of some prompts; iterate over it for the tokens of each round.

    Args:
        model: In eval mode, on its device.
        prompts: One list of token ids for each; lengths may differ.
        strategy: How to decode.
        max_new_tokens: Most tokens to add to a prompt; its continuation also ends at the model's
            context.
        batch_size: Prompts decoded at once; the next takes the row of the first that ends. All
            of them if not given.
        stop_tokens: Ids that end a prompt's continuation; the id itself is its last token.
        sampling: Greedy by default.
        seed: Of every random draw.
        async_readback: Launch each round before the tokens of the one before are read, so that the
            device does not wait for the host; the default on CUDA.
        graphs: CUDA graphs of rounds, kept for this generation and later ones; None: no graphs.

    Raises:
        ValueError: A prompt, the strategy's settings or max_new_tokens do not fit the model.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        strategy: Strategy,
        *,
        max_new_tokens: int,
        batch_size: int | None = None,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
        async_readback: bool | None = None,
        graphs: RoundGraphs | None = None,
    ) -> None:
        config = model.config
        strategy = strategy.with_defaults(config.n_layers)
        problems = strategy.problems(config.n_layers) + _problems(prompts, max_new_tokens, config)
        if batch_size is not None and batch_size < 1:
            problems.append(f"batch_size: {batch_size}, give at least 1")
        if problems:
            raise ValueError("; ".join(problems))
        self.prompts = [list(prompt) for prompt in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        """New tokens of each prompt so far."""
        self.drafts: list[Counter[DraftedRound]] = [Counter() for _ in prompts]
        """Rounds of each prompt that drafted, as in `Counters`."""
        self._prefill_layers = strategy.prefill_layers(config.n_layers)
        self._stop_tokens = frozenset(stop_tokens)
        self._ends = [min(len(p) + max_new_tokens, config.max_seq_len) for p in self.prompts]
        rows = min(batch_size or len(prompts), len(prompts))
        self._rows: list[int | None] = [*range(rows)]
        """The prompt in each row; None: the row stays empty."""
        self._next_prompt = rows
        device = model.norm.weight.device
        self._async_readback = device.type == "cuda" if async_readback is None else async_readback
        self._in_flight: deque[InFlightRound] = deque()
        self._graphs = graphs
        self._batch: GraphedBatch | None = None
        self._open_batch(model, strategy, sampling or Sampling(), seed)
        self.counters = self._state.counters

    def _open_batch(self, model: Llama, strategy: Strategy, sampling: Sampling, seed: int) -> None:
        """Allocate a batch, or take the one that graphs are kept of."""
        rows, slots = len(self._rows), max(self._ends)
        spare = strategy.spare_slots(slots)
        if self._graphs is None:
            self._state = allocate(
                model, rows, slots=slots, sampling=sampling, seed=seed, spare=spare
            )
            self._run_round = advancing(self._state.batch, strategy.start(self._state))
        else:
            self._batch = self._graphs.take(
                model, rows, slots=slots, sampling=sampling, seed=seed, spare=spare
            )
            self._state, self._run_round = self._batch.state, self._batch.start(strategy)

    def __iter__(self) -> Iterator[list[Emission]]:
        return self

    @torch.inference_mode()
    def __next__(self) -> list[Emission]:
        """Run one round, and the prompts before the first; return the tokens of each prompt."""
        if not any(prompt is not None for prompt in self._rows):
            self._give_back()
            raise StopIteration
        if self.counters.rounds == 0:
            with self._timing_prefill():
                prefill(self._state, self.prompts[: len(self._rows)], self._prefill_layers)
        start, prefill_seconds = time.perf_counter(), self.counters.prefill_seconds
        if not self._in_flight:
            self._launch()
        if self._async_readback and self._max_tokens() > 0:
            self._launch()
        emissions = self._read()
        admitting = self.counters.prefill_seconds - prefill_seconds
        self.counters.decode_seconds += time.perf_counter() - start - admitting
        return emissions

    def finish(self) -> "Generation":
        """Run to the end and return itself."""
        for _ in self:
            pass
        return self

    def _give_back(self) -> None:
        """Hand the batch and its graphs back for the next generation."""
        if self._graphs is not None and self._batch is not None:
            self._graphs.give_back(self._batch)
            self._batch = None

    def _launch(self) -> None:
        """Launch a round, which advances the batch; its tokens are not read yet."""
        result = self._run_round(self._max_tokens())
        self._in_flight.append(InFlightRound(result, list(self._rows)))

    def _max_tokens(self) -> int:
        """Return the most tokens a round may add to a row: 0 if every prompt may have ended."""
        in_flight = len(self._in_flight)  # each adds at least one token to every row
        left = max(self._remaining(p) for p in self._rows if p is not None) - in_flight
        return max(0, min(left, self._state.cache.slots - self._state.batch.max_position))

    def _read(self) -> list[Emission]:
        """Read the oldest round in flight; rows whose prompts have ended get the next ones."""
        in_flight, counters = self._in_flight.popleft(), self.counters
        tokens, accepted, drafted, leaves, depths = in_flight.read()
        emissions = []
        for row, prompt in enumerate(in_flight.rows):
            if prompt is None or prompt != self._rows[row]:
                continue  # it had ended before this round
            new, kept, tried = cut(
                tokens[row],
                accepted[row],
                drafted[row],
                self._remaining(prompt),
                self._stop_tokens,
            )
            self.tokens[prompt] += new
            emissions.append(Emission(prompt, new, kept, tried))
            counters.tokens += len(new)
            counters.rounds += 1
            counters.drafted += tried
            counters.accepted += kept
            leaf = bool(leaves[row]) and len(new) >= accepted[row]
            counters.leaves += leaf
            counters.rejections += leaf or kept < tried
            counters.drafted_past_end += drafted[row] - tried
            if tried:
                whole = in_flight.most_drafted == tried
                why = "leaf" if leaf else self._why_no_more(prompt, kept < tried, whole)
                how = tried, kept, why
                counters.drafts[how] += 1
                self.drafts[prompt][how] += 1
            if depths is not None:
                counters.depths.update(depths[row][: len(new)])
        self._replace_finished()
        return emissions

    def _why_no_more(self, prompt: int, rejected: bool, whole: bool) -> StopReason:
        """Return why no more drafts were accepted in the last round of a prompt."""
        if rejected:
            return "rejected"
        if self.tokens[prompt][-1] in self._stop_tokens:
            return "end"
        if not self._remaining(prompt):
            return "limit"
        return "whole" if whole else "not_sure"

    def _remaining(self, prompt: int) -> int:
        """Return how many tokens may still be added to a prompt."""
        return self._ends[prompt] - len(self.prompts[prompt]) - len(self.tokens[prompt])

    def _replace_finished(self) -> None:
        """Put waiting prompts into rows that have ended, or park those; set `max_position`."""
        state, batch = self._state, self._state.batch
        for row, prompt in enumerate(self._rows):
            if prompt is None:
                continue
            if self._remaining(prompt) and not self._stop_tokens.intersection(
                self.tokens[prompt][-1:]
            ):
                continue
            self._rows[row] = None
            if self._next_prompt < len(self.prompts):
                self._rows[row] = self._next_prompt
                with self._timing_prefill():
                    prefill_row(state, row, self.prompts[self._next_prompt], self._prefill_layers)
                self._next_prompt += 1
            else:
                batch.park(row)
        in_flight = sum(round.n for round in self._in_flight)
        positions = [
            len(self.prompts[prompt]) + len(self.tokens[prompt]) - 1
            for prompt in self._rows
            if prompt is not None
        ]
        batch.max_position = max(positions, default=0) + in_flight

    @contextmanager
    def _timing_prefill(self) -> Iterator[None]:
        state, start = self._state, time.perf_counter()
        state.counters = Counters()
        yield
        wait_for(state.batch.device)
        self.counters.prompt_token_layers += state.counters.token_layers
        state.counters = self.counters
        self.counters.prefill_seconds += time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished, so that a clock can be read on the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _problems(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: LlamaConfig
) -> list[str]:
    found = [] if prompts else ["prompts: none, give at least one"]
    if max_new_tokens < 1:
        found.append(f"max_new_tokens: {max_new_tokens}, give at least 1")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            found.append(f"prompt {number}: empty, give at least one token, for example BOS")
            continue
        if len(prompt) >= config.max_seq_len:
            found.append(
                f"prompt {number}: {len(prompt)} tokens leave no room in the model's context of "
                f"{config.max_seq_len}, shorten it to at most {config.max_seq_len - 1}"
            )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            found.append(
                f"prompt {number}: token {outside[0]} is outside the model's vocabulary of "
                f"{config.vocab_size}, encode it with the model's own tokenizer"
            )
    return found
