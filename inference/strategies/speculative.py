"""Speculative decoding with two models: a smaller one drafts, ours verifies.

Leviathan et al. (arXiv 2211.17192). The draft model keeps its own keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch

from inference.engine.compiled import compile_layers, is_compiled
from inference.engine.counters import Counters
from inference.engine.prefill import allocate
from inference.engine.sampling import sample
from inference.engine.state import Decoder, DecodeState, GraphableDecoder, Round
from inference.engine.strategy import Strategy
from inference.loading.quantized import Bits, bits_of
from inference.loading.run import Run, load_run
from inference.strategies.drafting import Draft
from inference.strategies.self_speculative import accept_round, verify
from models.checkpoint_format import find_checkpoint, read_manifest
from models.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Speculative(Strategy):
    """Draft d tokens with another model, then verify them."""

    name: ClassVar[str] = "speculative"
    draft: Path | None = None
    """Run or checkpoint folder of the draft model, which must have the same tokenizer."""
    d: int = 4
    """Tokens drafted in a round, at least 1; fewer where fewer are left to decode."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = []
        if self.draft is None:
            found.append(
                "draft: none, speculative needs the folder of a smaller model, give draft=DIR"
            )
        if self.d < 1:
            found.append(f"d: {self.d}, give at least 1 drafted token")
        return found

    def start(self, state: DecodeState) -> Decoder:
        """Load the draft model, compiled and quantised as the other is, and begin to decode.

        Raises:
            ValueError: its vocabulary is another, or its context is too short.
        """
        assert self.draft is not None
        weight, config = state.model.norm.weight, state.model.config
        dtype = str(weight.dtype).removeprefix("torch.")
        bits = bits_of(state.model)
        model = _load(self.draft, str(weight.device), dtype, bits, is_compiled(state.model)).model
        if model.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"draft: {self.draft} has a vocabulary of {model.config.vocab_size} and the model "
                f"one of {config.vocab_size}, give a model with the same tokenizer"
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
        run = load_run(path, device=device, dtype=dtype, quantize=bits)
    except ValueError as error:
        raise ValueError(f"draft: {error}") from None
    if compiled:
        compile_layers(run.model)
    return run


def check_tokenizer(strategy: Strategy, run: Run) -> None:
    """Make sure that a draft model reads the tokens of the model it drafts for.

    Raises:
        ValueError: it has another tokenizer.
    """
    if not isinstance(strategy, Speculative) or strategy.draft is None:
        return
    theirs = read_manifest(find_checkpoint(strategy.draft, "draft")).tokenizer_fingerprint
    if theirs != run.tokenizer.fingerprint:
        raise ValueError(
            f"draft: {strategy.draft} has tokenizer {theirs[:12]} and {run.checkpoint} has "
            f"{run.tokenizer.fingerprint[:12]}, give a model trained with the same one"
        )


class TwoModels:
    """The rounds of one generation.

    Args:
        state: The batch of the model that verifies.
        model: The one that drafts.
    """

    def __init__(self, state: DecodeState, model: Llama) -> None:
        """Open the draft model's own batch; see the class."""
        self._state = state
        self._own = allocate(
            model,
            len(state.positions),
            slots=state.cache.slots,
            sampling=state.sampling,
            seed=0,
        )
        self._own.history.fill_(-1)  # what the draft model has run, by place; -1: nothing
        self._caught_up: int | None = None
        """`num_prefills` of the state when the draft model had last seen all; None: it has not."""

    def prepare(self, n: int) -> None:
        """Let the draft model catch up before a round of n tokens, if there can be need.

        It keeps up by itself: a round leaves it one token behind at most, which the next runs
        anyway. Not so a prompt, nor a round in which it had nothing to draft.
        """
        if n == 1:
            self._caught_up = None
        elif self._caught_up != self._state.num_prefills:
            with self._counting():
                self._catch_up()
            self._caught_up = self._state.num_prefills

    def __call__(self, n: int) -> Round:
        """Draft n - 1 tokens, verify, accept: 1 to n tokens for every row."""
        with self._counting():
            drafted = self._draft(n - 1) if n > 1 else self._nothing()
        return accept_round(self._state, drafted, verify(self._state, 0, drafted))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count what the draft model runs as that of a draft model."""
        self._own.counters = own = Counters()
        yield
        self._state.counters.draft_token_layers += own.token_layers
        self._state.counters.draft_head_evaluations += own.head_evaluations

    def _nothing(self) -> Draft:
        rows, vocab = len(self._state.positions), self._state.model.config.vocab_size
        tokens = self._state.pending.new_empty(rows, 0)
        return Draft(tokens, torch.empty(rows, 0, vocab, device=tokens.device), None, [], [])

    def _draft(self, d: int) -> Draft:
        """Decode d tokens with the draft model."""
        state, own = self._state, self._own
        own.positions.copy_(state.positions)
        own.finished.copy_(state.finished)
        own.max_position = state.max_position
        # The token before the pending one may be the last of a draft accepted whole, which the
        # draft model has not run. Running it again does no harm.
        first = (state.positions - 1).clamp(min=0)
        tokens = state.history.gather(1, torch.stack((first, first + 1), dim=1))
        h = own.run(own.model.embed(tokens), 0, own.model.config.n_layers, first=first)
        h = h.gather(1, (state.positions - first)[:, None, None].expand(-1, 1, h.shape[2]))
        drafts, q = [state.pending[:, None]], []
        for i in range(d):
            if i:
                h = own.run(own.model.embed(drafts[-1]), 0, own.model.config.n_layers, offset=i)
            q.append(own.distribution(h))
            drafts.append(sample(q[-1], state.generator))
        ran = torch.cat(drafts[:-1], dim=1)
        places = state.positions[:, None] + torch.arange(d, device=ran.device)
        own.history.scatter_(1, first[:, None], tokens[:, :1])
        own.history.scatter_(1, places.clamp(max=own.history.shape[1] - 1), ran)
        return Draft(torch.cat(drafts[1:], dim=1), torch.cat(q, dim=1), None, [], [])

    def _catch_up(self) -> None:
        """Run what a row holds and the draft model has not seen: prompts, for the most part.

        What it has run is compared with what the row holds, so that a row given another prompt
        needs no telling.
        """
        state, own = self._state, self._own
        own.max_position = state.max_position
        same = (own.history == state.history).long().cumprod(1).sum(1)
        count = max(state.sync_list(state.positions - 1 - same))
        if count <= 0:
            return
        # Rows that are less behind run some tokens again.
        first = (state.positions - 1 - count).clamp(min=0)
        places = first[:, None] + torch.arange(count, device=first.device)
        tokens = state.history.gather(1, places)
        own.run(own.model.embed(tokens), 0, own.model.config.n_layers, first=first)
        own.history.scatter_(1, places, tokens)
