"""Drafting with parts of layers left out, wherever they are; verifying with all of them.

Draft & Verify (arXiv 2309.08168). Which attention and feed-forward parts are left out is searched
for each model: `python -m inference.skip_search`. A draft's keys are thrown away: verification runs
all layers on every drafted token and overwrites them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.drafting import NEVER, StopRule, draft
from inference.strategies.self_speculative import accept_round, verify
from models.llama import SkippedParts


@dataclass(frozen=True, kw_only=True)
class SkipDraft(Strategy):
    """Draft up to d tokens without some parts of the layers, then verify them with all.

    Section 3.3: with gamma the probability below which a draft ends, AR the running acceptance
    rate and AR_e that of the last round,
      AR    <- beta1 AR + (1 - beta1) AR_e
      gamma <- beta2 gamma + (1 - beta2) (gamma + eps if AR <= alpha else gamma - eps).
    As in the authors' code, gamma stays where the last round's drafts had all d tokens.
    """

    name: ClassVar[str] = "skip_draft"
    attention: tuple[int, ...] | None = None
    """Layers l whose attention drafts leave out; every other, but the first and the last, if not
    given."""
    feed_forward: tuple[int, ...] | None = None
    """Layers l whose feed-forward part drafts leave out; every fourth likewise if not given."""
    d: int = 12
    """Most tokens drafted in a round, the paper's K."""
    gamma: float = 0.6
    """At first, a row's draft ends after a token whose distribution has no probability as large
    as this; 0: never."""
    alpha: float = 0.9
    """Acceptance rate aimed at."""
    eps: float = 0.01
    """Step of gamma; 0 keeps it."""
    beta1: float = 0.5
    """Memory of the acceptance rate."""
    beta2: float = 0.9
    """Memory of gamma."""

    def with_defaults(self, n_layers: int) -> Self:
        """Return a copy with the parts set."""
        attention, feed_forward = self.attention, self.feed_forward
        if attention is None:
            attention = tuple(range(1, n_layers - 1, 2))
        if feed_forward is None:
            feed_forward = tuple(range(2, n_layers - 1, 4))
        return replace(self, attention=attention, feed_forward=feed_forward)

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = []
        for what, layers in (("attention", self.attention), ("feed_forward", self.feed_forward)):
            outside = [l for l in layers or () if not 0 <= l < n_layers]
            if outside:
                found.append(
                    f"{what}: {outside[0]}, skip_draft needs layers from 0 to {n_layers - 1} of "
                    "this model"
                )
        if self.d < 1:
            found.append(f"d: {self.d}, give at least 1 drafted token")
        for what in ("gamma", "alpha", "eps", "beta1", "beta2"):
            if not 0.0 <= getattr(self, what) <= 1.0:
                found.append(f"{what}: {getattr(self, what)}, give a number from 0 to 1")
        if self.gamma == 0.0:
            found += self.unused_settings("alpha", "eps", "beta1", "beta2", without="gamma above 0")
        elif self.eps == 0.0:
            found += self.unused_settings("alpha", "beta1", "beta2", without="eps above 0")
        return found

    @property
    def skipped(self) -> SkippedParts:
        """The parts drafts leave out."""
        return SkippedParts(frozenset(self.attention or ()), frozenset(self.feed_forward or ()))

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        rounds = _Rounds(self, state)
        return rounds if self.gamma > 0.0 else GraphableDecoder(self.d + 1, rounds)


class _Rounds:
    """The rounds of one generation, which share gamma; it stays on the device."""

    def __init__(self, settings: SkipDraft, state: DecodeState) -> None:
        self._settings, self._state = settings, state
        self._stop = LearningStop(settings, state.batch.positions.device)

    def __call__(self, max_tokens: int) -> Round:
        settings, state = self._settings, self._state
        stop: StopRule = NEVER if settings.gamma == 0.0 else self._stop
        d, L = min(settings.d, max_tokens - 1), state.model.config.n_layers
        drafted = draft(state, L, d, stop=stop, skipped=settings.skipped)
        # Nothing of the draft's pass is used again.
        drafted = replace(drafted, exits=[])
        result = accept_round(state, drafted, verify(state, 0, drafted))
        if d and not stop.never:
            self._stop.learn(result, d, ~state.batch.finished)
        return result


class LearningStop:
    """Ends a draft after a token with less probability than gamma, and moves gamma."""

    never = False

    def __init__(self, settings: SkipDraft, device: torch.device) -> None:
        """Begin at the settings' gamma, with a running acceptance rate as aimed at."""
        self._settings = settings
        self.gamma = torch.tensor(settings.gamma, device=device)
        self.rate = torch.tensor(settings.alpha, device=device)

    def is_sure(self, logits: Tensor) -> Tensor:
        """Return (batch,) bool for logits: (batch, 1, vocab)."""
        return logits[:, 0].float().softmax(-1).amax(-1) >= self.gamma

    def learn(self, result: Round, d: int, active: Tensor) -> None:
        """Take in a round of drafts of up to d tokens, of the rows that are `active`: (batch,)."""
        s = self._settings
        drafted = (result.drafted * active).sum()
        rate = (result.accepted * active).sum() / drafted.clamp(min=1)
        self.rate = s.beta1 * self.rate + (1 - s.beta1) * rate
        step = torch.where(self.rate <= s.alpha, s.eps, -s.eps)
        full = ((result.drafted == d) | ~active).all()
        moved = s.beta2 * self.gamma + (1 - s.beta2) * (self.gamma + step)
        self.gamma = torch.where(full, self.gamma, moved.clamp(0.0, 1.0))
