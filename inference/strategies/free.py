"""Early exits whose missing layers are made up for later, for many tokens at once.

FREE (arXiv 2310.05424): a token whose exit is sure leaves its state waiting there; when a token is
not sure, the layers behind the exit run for all waiting tokens and for it in one causal pass, so
that every key and value is what a full forward would have written. EE-LLM (arXiv 2312.04916,
section 4: KV recomputation) does so with several exits and a bound on how many may wait.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.engine.batch import Round
from inference.engine.decoder import Decoder
from inference.engine.sampling import accept, sample
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy, exits_problems
from inference.strategies.beta_mixture import RowThresholds
from inference.strategies.confidence import softmax_gap
from inference.strategies.early_exit import a_quarter


@dataclass(frozen=True, kw_only=True)
class Free(Strategy):
    """Leave at the first exit that is sure; run the layers left out when a token needs them."""

    name: ClassVar[str] = "free"
    exits: tuple[int, ...] | None = None
    """The E at which tokens may leave, ascending; a quarter of the model's layers if not given."""
    confidence: Literal["gap", "maxprob"] = "gap"
    """gap (FREE): the two largest probabilities, one less the other. maxprob (EE-LLM): the
    largest."""
    threshold: float = 0.9
    """Confidence at which a token leaves; above 1 none does."""
    max_pending: int = 16
    """Most tokens that wait; then the layers left out run in any case."""
    adapt: bool = False
    """Move the threshold, for each prompt from the first on, to where exits turn out to be right:
    see `beta_mixture`. The head is put on all tokens that waited."""
    zeta: float = 0.4
    """An adapted threshold is where the last layer agrees with a chance above this."""
    rollback: Literal["off", "threshold", "exact"] = "off"
    """What becomes of tokens the last layer would not have chosen. off: they stay. threshold: the
    first with a cross entropy above rollback_threshold is replaced and what follows it forgotten.
    exact: as in speculative decoding, which keeps the model's own distribution."""
    rollback_threshold: float = 4.0
    """Cross entropy in nats under the last layer."""

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with the exits set."""
        if self.exits is not None:
            return self
        return replace(self, exits=(min(a_quarter(n_layers), max(n_layers - 1, 1)),))

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = exits_problems(self.name, self.exits or (), n_layers)
        if not self.threshold >= 0.0:
            found.append(f"threshold: {self.threshold}, give at least 0")
        if not 0.0 < self.zeta < 1.0:
            found.append(f"zeta: {self.zeta}, give a number between 0 and 1")
        elif not self.adapt:
            found += self.unused_settings("zeta", without="adapt=true")
        if self.max_pending < 1:
            found.append(f"max_pending: {self.max_pending}, give at least 1 token")
        if not self.rollback_threshold >= 0.0:
            found.append(f"rollback_threshold: {self.rollback_threshold}, give nats, at least 0")
        elif self.rollback != "threshold":
            found += self.unused_settings("rollback_threshold", without="rollback=threshold")
        return found

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
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
        """Decode until a row needs the last layer, then run what was left out for all of them.

        All rows take the same number of tokens; each token comes from the exit its own row was
        sure at, so that it is what the row would get alone.
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
        """Say how sure an exit is, (batch,), for logits: (batch, vocab)."""
        if self.confidence == "gap":
            return softmax_gap(logits)
        return logits.float().softmax(-1).amax(-1)


class _Run:
    """One round: tokens found so far, and states waiting at each exit."""

    def __init__(
        self, settings: Free, state: DecodeState, thresholds: RowThresholds | None
    ) -> None:
        assert settings.exits is not None
        self._settings, self._state, self._thresholds = settings, state, thresholds
        self._stages = [0, *settings.exits, state.model.config.n_layers]
        self._waiting: list[list[Tensor]] = [[] for _ in self._stages]
        self._tokens = [state.batch.pending[:, None]]
        self._depths: list[Tensor] = []
        self._q: list[Tensor] = []
        self._confidences: list[Tensor] = []
        """By token, (batch, exits)."""
        self._said: list[Tensor] = []
        """By token, (batch, exits) int64, the exits' own tokens; -1 where a row had left before."""
        self._begun = 0
        """Tokens of each row that are past the embedding."""
        self._last: Tensor | None = None
        """The last layer's logits, (batch, 1, vocab), where the last token needed them."""

    def next_token(self) -> bool:
        """Find each row's next token; say whether one came from the last layer."""
        state, rows = self._state, len(self._state.batch.pending)
        self._waiting[0].append(state.model.embed(self._tokens[-1]))
        self._begun += 1
        undecided = ~state.batch.finished
        depth = torch.full((rows,), self._stages[1], device=undecided.device)
        confidences = torch.zeros(rows, len(self._stages) - 2, device=undecided.device)
        said = torch.full(confidences.shape, -1, device=undecided.device)
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
                    said[:, stage - 1] = here.argmax(-1).where(undecided, -1)
                undecided = undecided & ~(confidence >= self._threshold())
        q = state.filtered(logits[:, None])
        self._q.append(q)
        self._tokens.append(sample(q, state.generator))
        self._depths.append(depth)
        self._confidences.append(confidences)
        self._said.append(said)
        if self._stages[-1] == E:
            self._last = here[:, None]
        return self._last is not None

    def _threshold(self) -> Tensor | float:
        if self._thresholds is None:
            return self._settings.threshold
        return self._thresholds.of_token(self._begun - 1)

    def _advance(self, stage: int) -> Tensor:
        """Run what waits before a stage up to it; return the states, which wait there now."""
        waiting = torch.cat(self._waiting[stage - 1], dim=1)
        # Those that wait before the earliest stage are the latest tokens.
        offset = self._begun - waiting.shape[1]
        h = self._state.run(waiting, self._stages[stage - 1], self._stages[stage], offset=offset)
        self._waiting[stage - 1] = []
        self._waiting[stage].append(h)
        return h

    def finish(self) -> Round:
        """Run every layer left out, and accept_round which tokens stay."""
        # Tokens wait in order: the later a stage, the earlier its tokens.
        for stage in range(2, len(self._stages)):
            if self._waiting[stage - 1]:
                self._advance(stage)
        return self._settle(torch.cat(self._waiting[-1], dim=1))

    def _settle(self, x_L: Tensor) -> Round:
        """Keep or replace the tokens, given the last layer's states: (batch, n, dim)."""
        state, settings, L = self._state, self._settings, self._stages[-1]
        tokens, depths = torch.cat(self._tokens[1:], dim=1), torch.stack(self._depths, dim=1)
        n = tokens.shape[1]
        drafted = torch.full_like(state.batch.positions, n - 1)
        if settings.rollback == "off" and self._thresholds is None:
            return Round(tokens, accepted=drafted, drafted=drafted, depths=depths)
        logits = self._last_layers_logits(x_L)
        if self._thresholds is not None:
            said = torch.stack(self._said, dim=1)  # (batch, n, exits)
            right = said == logits.argmax(-1, keepdim=True)
            self._thresholds.learn(torch.stack(self._confidences, dim=1), right, said >= 0)
        if settings.rollback == "off":
            return Round(tokens, accepted=drafted, drafted=drafted, depths=depths)
        p = state.filtered(logits)
        if settings.rollback == "exact":
            q = torch.cat(self._q, dim=1)[:, :-1]
            accepted, token = accept(tokens[:, :-1], q, p, state.generator)
            depths = torch.full_like(depths, L)
        else:
            surprise = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")
            fit = (surprise <= settings.rollback_threshold) | (depths == L)
            fits = fit.long().cumprod(-1).sum(-1)
            bad, accepted = fits < n, fits.clamp(max=n - 1)  # the first that does not fit, if any
            rows = torch.arange(len(tokens), device=tokens.device)
            own, depth = tokens[rows, accepted], depths[rows, accepted]
            token = torch.where(bad, sample(p[rows, accepted], state.generator), own)
            depths = depths.scatter(1, accepted[:, None], torch.where(bad, L, depth)[:, None])
        tokens = tokens.scatter(1, accepted[:, None], token[:, None])
        return Round(tokens, accepted, drafted=drafted, depths=depths)

    def _last_layers_logits(self, x_L: Tensor) -> Tensor:
        """Return them for x_L: (batch, n, dim), the last token's from where they were found."""
        if self._last is None:
            return self._state.logits(x_L)
        if x_L.shape[1] == 1:
            return self._last
        return torch.cat((self._state.logits(x_L[:, :-1]), self._last), dim=1)
