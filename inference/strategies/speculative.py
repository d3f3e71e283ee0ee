"""Speculative decoding with two models: a smaller one drafts, the run's own verifies.

Leviathan et al. (arXiv 2211.17192). The draft model keeps its own KV cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.compiled import is_compiled
from inference.engine.counters import Counters
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.prefill import allocate
from inference.engine.sampling import sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.loading.quantized import Bits, bits_of
from inference.loading.run import Run, load_run
from inference.strategies.drafting import Draft
from inference.strategies.reduced_head import check_counts
from inference.strategies.self_speculative import SelfSpeculative, accept_round, verify
from models.checkpoint_format import find_checkpoint, read_manifest
from models.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Speculative(Strategy):
    """Draft d tokens with a separate draft model, then verify them."""

    name: ClassVar[str] = "speculative"
    draft: Path | None = None
    """Run or checkpoint folder of the draft model, which must have the same tokenizer."""
    d: int = 4
    """Tokens drafted in a round, at least 1; fewer where fewer are left to decode."""

    @property
    def lossless(self) -> bool:
        return True

    def problems(self, n_layers: int) -> list[str]:
        found = []
        if self.draft is None:
            found.append(
                "draft: none, speculative needs the folder of a smaller model, give draft=DIR"
            )
        return found + self.below(1, d="drafted token")

    def start(self, state: DecodeState) -> Decoder:
        """Load the draft model, compiled and quantized as the verifier is.

        Raises:
            ValueError: Its vocabulary is another, or its context is too short.
        """
        assert self.draft is not None
        weight, config = state.model.norm.weight, state.model.config
        dtype = str(weight.dtype).removeprefix("torch.")
        bits = bits_of(state.model)
        model = _load(self.draft, str(weight.device), dtype, bits, is_compiled(state.model)).model
        if model.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"draft: {self.draft} has a vocabulary of {model.config.vocab_size} and the model "
                f"one of {config.vocab_size}, give a model with as many ids"
            )
        if model.config.max_seq_len < state.cache.slots:
            raise ValueError(
                f"draft: {self.draft} has a context of {model.config.max_seq_len}, but rows may "
                f"have {state.cache.slots} tokens, decode fewer or give another model"
            )
        rounds = TwoModels(state, model)
        return GraphableDecoder(self.d + 1, rounds, rounds.prepare)


@lru_cache(maxsize=4)  # drafts that a benchmark measures in turn
def _load(path: Path, device: str, dtype: str, bits: Bits | None, compiled: bool) -> Run:
    try:
        return load_run(path, device=device, dtype=dtype, quantize=bits, compiled=compiled)
    except ValueError as error:
        raise ValueError(f"draft: {error}") from None


def check_tokenizer(strategy: Strategy, run: Run) -> None:
    """Check that a draft model or token counts, if there are any, are of the run's tokenizer.

    Raises:
        ValueError: They are of another.
    """
    if isinstance(strategy, SelfSpeculative) and strategy.token_counts is not None:
        check_counts(strategy.token_counts, run.tokenizer.fingerprint)
    if not isinstance(strategy, Speculative) or strategy.draft is None:
        return
    theirs = read_manifest(find_checkpoint(strategy.draft, "draft")).tokenizer_fingerprint
    if theirs != run.tokenizer.fingerprint:
        raise ValueError(
            f"draft: {strategy.draft} has tokenizer {theirs[:12]} and {run.checkpoint} has "
            f"{run.tokenizer.fingerprint[:12]}, give a model trained with the same one"
        )


class TwoModels:
    """The rounds of one generation, with a batch and a KV cache of the draft model's own.

    Args:
        state: The batch, with the model that verifies.
        model: The draft model.
    """

    def __init__(self, state: DecodeState, model: Llama) -> None:
        self._state = state
        self._drafter = allocate(
            model, len(state.batch), slots=state.cache.slots, sampling=state.sampling, seed=0
        )
        # The tokens that the draft model has run, by position; -1: none.
        self._drafter.batch.history.fill_(-1)
        self._caught_up: int | None = None
        """`num_prefills` of the batch when the draft model had last run all that rows held; None
        where it is behind."""

    def prepare(self, n: int) -> None:
        """Run the draft model on what it missed, before a round of n tokens.

        It misses a prompt, and what was decoded in a round without drafts. After any other round it
        is one token behind at most, which the next round runs anyway.
        """
        if n == 1:
            self._caught_up = None
        elif self._caught_up != self._state.batch.num_prefills:
            with self._counting():
                self._catch_up()
            self._caught_up = self._state.batch.num_prefills

    def __call__(self, n: int) -> Round:
        """Draft n - 1 tokens, verify, accept: 1 to n tokens for every row."""
        with self._counting():
            drafted = self._draft(n - 1) if n > 1 else self._no_draft()
        return accept_round(self._state, drafted, verify(self._state, 0, drafted))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Add what the draft model runs to the counts of draft models."""
        self._drafter.counters = spent = Counters()
        yield
        self._state.counters.draft_token_layers += spent.token_layers
        self._state.counters.draft_head_evaluations += spent.head_evaluations

    def _no_draft(self) -> Draft:
        tokens = self._state.batch.history[:, :0]
        return Draft(tokens, self._all_q([]), None, [], [])

    def _all_q(self, q: list[Tensor]) -> Tensor | None:
        """Return what tokens were drawn from, each (batch, 1, vocab), as `Draft` has it."""
        if self._state.generator is None:
            return None
        vocab_size = self._state.model.config.vocab_size
        none = torch.empty(len(self._state.batch), 0, vocab_size, device=self._state.batch.device)
        return torch.cat((none, *q), dim=1)

    def _draft(self, d: int) -> Draft:
        """Decode d tokens with the draft model."""
        batch, ran = self._state.batch, self._drafter.batch
        self._drafter.draws = self._state.draws
        ran.positions.copy_(batch.positions)
        ran.finished.copy_(batch.finished)
        ran.max_position = batch.max_position
        # The token before the pending one may be the last of a draft accepted whole, which the
        # draft model has not run. Running it again does no harm.
        first = (batch.positions - 1).clamp(min=0)
        tokens = batch.history.gather(1, torch.stack((first, first + 1), dim=1))
        h = self._run(tokens, first=first)
        h = h.gather(1, (batch.positions - first)[:, None, None].expand(-1, 1, h.shape[2]))
        drafts, q = [batch.pending[:, None]], []
        for i in range(d):
            if i:
                h = self._run(drafts[-1], offset=i)
            here = batch.positions[:, None] + i
            q.append(self._drafter.distribution(h, positions=here))
            drafts.append(sample(q[-1], self._state.generator))
        positions = batch.positions[:, None] + torch.arange(d, device=batch.device)
        positions = positions.clamp(max=ran.history.shape[1] - 1)
        ran.history.scatter_(1, first[:, None], tokens[:, :1])
        ran.history.scatter_(1, positions, torch.cat(drafts[:-1], dim=1))
        return Draft(torch.cat(drafts[1:], dim=1), self._all_q(q), None, [], [])

    def _catch_up(self) -> None:
        """Run the draft model on tokens it has not run, prompts for the most part.

        The tokens it has run are compared with those each row holds, so that a row with a new
        prompt needs no mark.
        """
        batch, ran = self._state.batch, self._drafter.batch
        ran.max_position = batch.max_position
        same = (ran.history == batch.history).long().cumprod(1).sum(1)
        count = max(self._state.sync_list(batch.positions - 1 - same))
        if count <= 0:
            return
        # Rows that are less behind run some tokens again.
        first = (batch.positions - 1 - count).clamp(min=0)
        positions = first[:, None] + torch.arange(count, device=batch.device)
        tokens = batch.history.gather(1, positions)
        self._run(tokens, first=first)
        ran.history.scatter_(1, positions, tokens)

    def _run(self, tokens: Tensor, *, offset: int = 0, first: Tensor | None = None) -> Tensor:
        """Run all layers on tokens: (batch, seq) int64; the rest as in `DecodeState.run`."""
        model = self._drafter.model
        h = model.embed(tokens)
        return self._drafter.run(h, 0, model.config.n_layers, offset=offset, first=first)
