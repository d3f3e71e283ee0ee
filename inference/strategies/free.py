"""FREE (arXiv 2310.05424): early exits whose missing layers run later, for many tokens at once.

A token that exits leaves its state deferred at the exit; when a token is not confident, the layers
behind the exit run for all deferred tokens and for it in one causal pass, so that every key and
value is that of a full forward. EE-LLM (arXiv 2312.04916, section 4: KV recomputation) does so with
several exits and a bound on the number of deferred tokens.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.engine.batch import Round
from inference.engine.counters import Counters
from inference.engine.decoder import Decoder
from inference.engine.sampling import accept, sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy, exit_list_problems
from inference.strategies.beta_mixture import RowThresholds, block_length
from inference.strategies.confidence import softmax_gap, top_probability
from inference.strategies.early_exit import default_exit


@dataclass(frozen=True, kw_only=True)
class Free(Strategy):
    """Exit at the first confident exit; run the layers left out when a token needs them."""

    name: ClassVar[str] = "free"
    exits: tuple[int, ...] | None = None
    """The E at which tokens may exit, ascending; a quarter of the model's layers if not given, none
    if it has one layer."""
    confidence: Literal["gap", "maxprob"] = "gap"
    """gap (FREE): difference of the two largest probabilities. maxprob (EE-LLM): the largest."""
    threshold: float = 0.9
    """Confidence at which a token exits; above 1 none exits early."""
    max_pending: int = 16
    """Most deferred tokens of a row; then the layers left out run in any case."""
    adapt: bool = False
    """Move the threshold, for each prompt from the first on, to where exits turn out to be right:
    see `beta_mixture`. The head runs on all deferred tokens."""
    zeta: float = 0.4
    """An adapted threshold is where the last layer agrees with a chance above this."""
    rollback: Literal["off", "threshold", "exact"] = "off"
    """Treatment of tokens the last layer would not have chosen. off: they stay. threshold: the
    first with a cross entropy above rollback_threshold is replaced, and those after it are dropped.
    exact: as in speculative decoding, which keeps the model's own distribution."""
    rollback_threshold: float = 4.0
    """Cross entropy in nats under the last layer."""

    @property
    def lossless(self) -> bool:
        return self.rollback == "exact"

    def with_defaults(self, n_layers: int) -> Self:
        if self.exits is not None:
            return self
        E = min(default_exit(n_layers), n_layers - 1)
        return replace(self, exits=(E,) if E else ())

    def problems(self, n_layers: int) -> list[str]:
        found = exit_list_problems(self.name, self.exits or (), n_layers)
        found += self.below(0, threshold="")
        if not 0.0 < self.zeta < 1.0:
            found.append(f"zeta: {self.zeta}, give a number between 0 and 1")
        elif not self.adapt:
            found += self.unused_settings("zeta", without="adapt=true")
        found += self.below(1, max_pending="token")
        if too_low := self.below(0, rollback_threshold="nats"):
            found += too_low
        elif self.rollback != "threshold":
            found += self.unused_settings("rollback_threshold", without="rollback=threshold")
        return found

    def remark(self, counters: Counters) -> str:
        """Return where the threshold went, if it is adapted."""
        if not self.adapt:
            return ""
        if moves := counters.thresholds:
            ends = f"{min(moves):g} and {max(moves):g}"
            return f"threshold: {self.threshold:g}, moved {moves.total()} times, to between {ends}"
        first = 2 * block_length(self.max_pending)
        return (
            f"threshold: stayed at {self.threshold:g}; it moves after {first} new tokens of a text "
            "at the earliest, and from 4 exits that were right and 4 that were wrong on"
        )

    def start(self, state: DecodeState) -> Decoder:
        thresholds = None
        if self.adapt:
            thresholds = RowThresholds(
                state,
                exits=len(self.exits or ()),
                first=self.threshold,
                zeta=self.zeta,
                longest_round=min(self.max_pending, state.cache.slots),
            )
        return partial(self._round, state, thresholds)

    def _round(
        self, state: DecodeState, thresholds: RowThresholds | None, max_tokens: int
    ) -> Round:
        """Decode until a row needs the last layer, then run the layers left out for all tokens.

        All rows decode the same number of tokens; each token comes from the first exit at which its
        own row was confident, so that it is the one the row would get alone.
        """
        run = _Run(self, state, thresholds)
        if thresholds is not None:
            thresholds.begin()
        last = min(self.max_pending, max_tokens) - 1
        for i in range(last + 1):
            if run.next_token() or i == last:
                break
        return run.finish()

    def confidence_of(self, logits: Tensor) -> Tensor:
        """Return the confidence of an exit, (batch,), for logits: (batch, vocab)."""
        return softmax_gap(logits) if self.confidence == "gap" else top_probability(logits)


class _Run:
    """One round: the tokens so far, and the states deferred at each exit."""

    def __init__(
        self, settings: Free, state: DecodeState, thresholds: RowThresholds | None
    ) -> None:
        assert settings.exits is not None
        self._settings, self._state, self._thresholds = settings, state, thresholds
        self._stages = [0, *settings.exits, state.model.config.n_layers]
        self._deferred: list[list[Tensor]] = [[] for _ in self._stages]
        """By stage, x of consecutive tokens that have run up to it, (batch, n, dim) each."""
        self._tokens = [state.batch.pending[:, None]]
        self._depths: list[Tensor] = []
        self._q: list[Tensor] = []
        self._confidences: list[Tensor] = []
        """By token, (batch, exits)."""
        self._predicted: list[Tensor] = []
        """By token, (batch, exits) int64, the exits' own tokens; -1 where a row exited before."""
        self._embedded = 0
        """Tokens of each row that are past the embedding."""
        self._last: Tensor | None = None
        """The last layer's logits, (batch, 1, vocab), if the last token came from there."""

    def next_token(self) -> bool:
        """Decode each row's next token; return whether one came from the last layer."""
        state, rows = self._state, len(self._state.batch)
        self._deferred[0].append(state.model.embed(self._tokens[-1]))
        self._embedded += 1
        undecided = ~state.batch.finished
        depth = torch.full((rows,), self._stages[1], device=undecided.device)
        confidences = torch.zeros(rows, len(self._stages) - 2, device=undecided.device)
        predicted = torch.full(confidences.shape, -1, device=undecided.device)
        logits, E = torch.zeros(0), 0
        for stage in range(1, len(self._stages)):
            if stage > 1 and not state.sync_bool(undecided.any()):
                break
            E = self._stages[stage]
            here = state.logits(self._advance(stage)[:, -1:], E)[:, 0]
            logits = here if stage == 1 else torch.where(undecided[:, None], here, logits)
            depth = torch.where(undecided, E, depth)
            if self._stages[-1] > E:
                confidence = self._settings.confidence_of(here)
                if self._thresholds is not None:
                    confidences[:, stage - 1] = confidence
                    predicted[:, stage - 1] = here.argmax(-1).where(undecided, -1)
                undecided = undecided & ~(confidence >= self._threshold())
        positions = state.batch.positions[:, None] + self._embedded - 1
        q = state.filtered(logits[:, None], positions=positions)
        self._q.append(q)
        self._tokens.append(sample(q, state.generator))
        self._depths.append(depth)
        self._confidences.append(confidences)
        self._predicted.append(predicted)
        if self._stages[-1] == E:
            self._last = here[:, None]
        return self._last is not None

    def _threshold(self) -> Tensor | float:
        if self._thresholds is None:
            return self._settings.threshold
        return self._thresholds.of_token(self._embedded - 1)

    def _advance(self, stage: int) -> Tensor:
        """Run the tokens deferred before a stage up to it; return their states, deferred there."""
        deferred = torch.cat(self._deferred[stage - 1], dim=1)
        # Those deferred before the earliest stage are the latest tokens.
        offset = self._embedded - deferred.shape[1]
        h = self._state.run(deferred, self._stages[stage - 1], self._stages[stage], offset=offset)
        self._deferred[stage - 1] = []
        self._deferred[stage].append(h)
        return h

    def finish(self) -> Round:
        """Run every layer left out, and keep or replace the tokens."""
        # In order: the later a stage, the earlier the tokens deferred there.
        for stage in range(2, len(self._stages)):
            if self._deferred[stage - 1]:
                self._advance(stage)
        return self._accept(torch.cat(self._deferred[-1], dim=1))

    def _accept(self, x_L: Tensor) -> Round:
        """Keep or replace the tokens, given the last layer's states: (batch, n, dim)."""
        state, settings, L = self._state, self._settings, self._stages[-1]
        tokens, depths = torch.cat(self._tokens[1:], dim=1), torch.stack(self._depths, dim=1)
        n = tokens.shape[1]
        drafted = torch.full_like(state.batch.positions, n - 1)
        if settings.rollback == "off" and self._thresholds is None:
            return Round(tokens, accepted=drafted, drafted=drafted, depths=depths)
        logits = self._last_logits(x_L)
        if self._thresholds is not None:
            predicted = torch.stack(self._predicted, dim=1)  # (batch, n, exits)
            right = predicted == logits.argmax(-1, keepdim=True)
            self._thresholds.update(torch.stack(self._confidences, dim=1), right, predicted >= 0)
        if settings.rollback == "off":
            return Round(tokens, accepted=drafted, drafted=drafted, depths=depths)
        positions = state.batch.positions[:, None] + torch.arange(n, device=tokens.device)
        p = state.filtered(logits, positions=positions)
        if settings.rollback == "exact":
            q = None if state.generator is None else torch.cat(self._q, dim=1)[:, :-1]
            accepted, token = accept(tokens[:, :-1], q, p, state.generator)
            depths = torch.full_like(depths, L)
        else:
            surprisal = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")
            fits = (surprisal <= settings.rollback_threshold) | (depths == L)
            num_fitting = fits.long().cumprod(-1).sum(-1)
            # The first that does not fit, if any, is replaced.
            bad, accepted = num_fitting < n, num_fitting.clamp(max=n - 1)
            rows = torch.arange(len(tokens), device=tokens.device)
            own, depth = tokens[rows, accepted], depths[rows, accepted]
            token = torch.where(bad, sample(p[rows, accepted], state.generator), own)
            depths = depths.scatter(1, accepted[:, None], torch.where(bad, L, depth)[:, None])
        tokens = tokens.scatter(1, accepted[:, None], token[:, None])
        return Round(tokens, accepted, drafted=drafted, depths=depths)

    def _last_logits(self, x_L: Tensor) -> Tensor:
        """Return the last layer's logits for x_L: (batch, n, dim), the last token's if at hand."""
        if self._last is None:
            return self._state.logits(x_L)
        if x_L.shape[1] == 1:
            return self._last
        return torch.cat((self._state.logits(x_L[:, :-1]), self._last), dim=1)
