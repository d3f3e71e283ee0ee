"""Drafting without some parts of the layers, wherever they are, and verifying with all of them.

Draft & Verify (arXiv 2309.08168). `python -m inference.skip_search` searches for the attention and
feed-forward parts to leave out of a model. A draft's keys are discarded: verification runs all
layers on every drafted token and overwrites them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.decoder import Decoder, GraphableDecoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy
from inference.strategies.confidence import top_probability
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
    """A row's draft ends after a token whose distribution has no probability as large as this,
    which then adapts; 0: never."""
    alpha: float = 0.9
    """Target acceptance rate."""
    eps: float = 0.01
    """Step of gamma; 0 keeps it constant."""
    beta1: float = 0.5
    """Weight of the past in the running acceptance rate."""
    beta2: float = 0.9
    """Weight of the past in gamma."""

    @property
    def lossless(self) -> bool:
        return True

    def with_defaults(self, n_layers: int) -> Self:
        attention, feed_forward = self.attention, self.feed_forward
        if attention is None:
            attention = tuple(range(1, n_layers - 1, 2))
        if feed_forward is None:
            feed_forward = tuple(range(2, n_layers - 1, 4))
        return replace(self, attention=attention, feed_forward=feed_forward)

    def problems(self, n_layers: int) -> list[str]:
        found = []
        for what, layers in (("attention", self.attention), ("feed_forward", self.feed_forward)):
            outside = [l for l in layers or () if not 0 <= l < n_layers]
            if outside:
                found.append(
                    f"{what}: {outside[0]}, skip_draft needs layers from 0 to {n_layers - 1} of "
                    "this model"
                )
        found += self.below(1, d="drafted token")
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
        """The parts that drafts leave out."""
        return SkippedParts(frozenset(self.attention or ()), frozenset(self.feed_forward or ()))

    def start(self, state: DecodeState) -> Decoder:
        rounds = _Rounds(self, state)
        return rounds if self.gamma > 0.0 else GraphableDecoder(self.d + 1, rounds)


class _Rounds:
    """The rounds of one generation, which share gamma; it stays on the device."""

    def __init__(self, settings: SkipDraft, state: DecodeState) -> None:
        self._settings, self._state = settings, state
        self._stop = AdaptiveStop(settings, state.batch.device)

    def __call__(self, max_tokens: int) -> Round:
        settings, state = self._settings, self._state
        stop: StopRule = NEVER if settings.gamma == 0.0 else self._stop
        d, L = min(settings.d, max_tokens - 1), state.model.config.n_layers
        drafted = draft(state, L, d, stop=stop, skipped=settings.skipped)
        # Verification runs all layers again, so it needs no state of the draft.
        drafted = replace(drafted, exits=[])
        result = accept_round(state, drafted, verify(state, 0, drafted))
        if d and not stop.never:
            self._stop.update(result, d, ~state.batch.finished)
        return replace(result, most_drafted=d)


class AdaptiveStop:
    """Ends a draft after a token of less probability than gamma, which follows the acceptance rate.

    The running rate starts at the target.
    """

    never = False

    def __init__(self, settings: SkipDraft, device: torch.device) -> None:
        self._settings = settings
        self.gamma = torch.tensor(settings.gamma, device=device)
        self.rate = torch.tensor(settings.alpha, device=device)

    def is_confident(self, logits: Tensor) -> Tensor:
        return top_probability(logits[:, 0]) >= self.gamma

    def update(self, result: Round, d: int, active: Tensor) -> None:
        """Update rate and gamma by a round of drafts of up to d tokens.

        Args:
            result: The round.
            d: Most tokens of a draft.
            active: (batch,) bool, rows that count.
        """
        s = self._settings
        drafted = (result.drafted * active).sum()
        rate = (result.accepted * active).sum() / drafted.clamp(min=1)
        self.rate = s.beta1 * self.rate + (1 - s.beta1) * rate
        step = torch.where(self.rate <= s.alpha, s.eps, -s.eps)
        full = ((result.drafted == d) | ~active).all()
        moved = s.beta2 * self.gamma + (1 - s.beta2) * (self.gamma + step)
        self.gamma = torch.where(full, self.gamma, moved.clamp(0.0, 1.0))
