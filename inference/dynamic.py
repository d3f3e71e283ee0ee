"""Self-speculation that chooses E and d anew in every round.

DEL (arXiv 2504.05598). With a_E the probability that the exit after E layers agrees with the last
layer, a round that drafts d tokens with E layers gives 1 + a_E + ... + a_E^d tokens on average
(Leviathan et al., arXiv 2211.17192, eq. 1) and costs d c_E + v full steps. The best pair of
  (1 + a_E + ... + a_E^d) / (d c_E + v)        (DEL, eq. 4, with costs instead of layers)
is taken. What agreement every exit would have had is seen when a round is verified: all layers'
outputs of its tokens are at hand, and the head is put on them ("shadow tokens").
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from inference.autoregressive import decode_one
from inference.drafting import Stop, draft
from inference.self_speculative import draft_problems, guess, run_the_rest, settle, verify
from inference.state import Decoder, DecodeState, Round
from models.flops import block_params
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Draft up to d tokens with the E layers that promise most, then verify them with the rest."""

    name: ClassVar[str] = "dynamic"
    d: int = 6
    """Most tokens drafted in a round."""
    probe: int = 4
    """Rounds from one look at the agreement of all exits to the next."""
    memory: float = 0.95
    """What weight an observation keeps when the next comes."""
    head_cost: float | None = None
    """Cost of the LM head in layers; by its number of parameters if not given."""
    verify_cost: float = 1.0
    """v: cost of a verification in full steps."""
    stop: float = 0.0
    """As in self_speculative."""
    stop_entropy: float = float("inf")
    """As in self_speculative."""
    ngram: int = 0
    """As in self_speculative."""

    def filled(self, n_layers: int) -> "Dynamic":
        """Return itself: the head's cost is known when decoding starts."""
        return self

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = []
        if n_layers == 1:
            found.append("strategy: dynamic needs at least 2 layers, this model has 1")
        if self.d < 1:
            found.append(f"d: {self.d}, give at least 1 drafted token")
        if self.probe < 1:
            found.append(f"probe: {self.probe}, give at least 1 round")
        if not 0.0 < self.memory < 1.0:
            found.append(f"memory: {self.memory}, give a number between 0 and 1")
        if self.head_cost is not None and not self.head_cost >= 0.0:
            found.append(f"head_cost: {self.head_cost}, give layers, at least 0")
        if not self.verify_cost > 0.0:
            found.append(f"verify_cost: {self.verify_cost}, give full steps, more than 0")
        return found + draft_problems(self.stop, self.stop_entropy, self.ngram)

    def prompt_parts(self, n_layers: int) -> tuple[int, SkippedParts]:
        """Return all layers: verification uses them."""
        return n_layers, NOTHING

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        return _Rounds(self, state)


def best_pair(
    agreement: list[float], draft_costs: list[float], verify_cost: float, most: int
) -> tuple[int, int]:
    """Return (E, d) of the most tokens per full step.

    Args:
        agreement: a_E for E = 1, 2, ...
        draft_costs: c_E, one draft step over one full step, for the same E.
        verify_cost: v, one verification over one full step.
        most: Largest d.

    Returns:
        E and d; d = 0, plain decoding at the cost of 1, where no pair gives more than that.
    """
    best, pair = 1.0, (1, 0)
    for E, (a, c) in enumerate(zip(agreement, draft_costs, strict=True), start=1):
        tokens = 1.0
        for d in range(1, most + 1):
            tokens += a**d
            if tokens / (d * c + verify_cost) > best:
                best, pair = tokens / (d * c + verify_cost), (E, d)
    return pair


@dataclass
class _Rounds:
    """The rounds of one generation, and what they have seen of the exits' agreement."""

    settings: Dynamic
    state: DecodeState
    rounds: int = 0
    agreed: list[float] = field(init=False)
    """By E - 1: tokens of an exit seen to agree, old ones counting less."""
    seen: float = 2.0
    """Tokens looked at, old ones counting less; at first as if half of two had agreed."""
    draft_costs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Work out what drafting costs."""
        config = self.state.model.config
        head = self.settings.head_cost
        if head is None:
            head = config.dim * config.vocab_size / block_params(config)
        L = config.n_layers
        self.draft_costs = [(E + head) / (L + head) for E in range(1, L)]
        self.agreed = [1.0] * (L - 1)

    def __call__(self, room: int) -> Round:
        """Draft, verify, accept; now and then look at what every exit would have said."""
        settings, state = self.settings, self.state
        most = min(settings.d, room - 1)
        if settings.ngram and most and (guessed := guess(state, settings.ngram, most)) is not None:
            return settle(state, guessed, verify(state, 0, guessed))
        agreement = [agreed / self.seen for agreed in self.agreed]
        E, d = best_pair(agreement, self.draft_costs, settings.verify_cost, most)
        probing = self.rounds % settings.probe == 0
        self.rounds += 1
        L = state.model.config.n_layers
        if not probing:
            if d == 0:
                return decode_one(state, L, NOTHING, room)
            drafted = draft(state, E, d, stop=self._stop)
            return settle(state, drafted, verify(state, E, drafted))
        drafted = draft(state, E, d, stop=self._stop, tapped=tuple(range(E - 1)))
        first = E if d else 0  # without a draft, all layers are still to be run
        x_L, deep = run_the_rest(state, first, drafted, tuple(range(first, L - 1)))
        logits = state.logits(x_L)
        result = settle(state, drafted, state.filtered(logits))
        places = max(drafted.tokens.shape[1], 1)
        shallow = [
            torch.cat(xs, dim=1) for xs in zip(*map(_by_layer, drafted.shallow), strict=True)
        ]
        exits = [*shallow, *([torch.cat(drafted.exits, dim=1)] if d else []), *_by_layer(deep)]
        self._look(
            torch.stack([x[:, :places] for x in exits]), logits[:, :places].argmax(-1), result
        )
        return result

    @property
    def _stop(self) -> Stop:
        return Stop(self.settings.stop, self.settings.stop_entropy)

    def _look(self, exits: Tensor, full: Tensor, result: Round) -> None:
        """Count where each exit agrees with the last layer, among the tokens that were accepted.

        Args:
            exits: (L - 1, batch, n, dim), x_{l+1} for l = 0, ..., L - 2.
            full: (batch, n) int64, what the last layer says.
            result: The round.
        """
        n = full.shape[1]
        places = torch.arange(n, device=full.device)
        true = (places <= result.accepted[:, None]) & ~self.state.finished[:, None]
        said = self.state.logits(exits.flatten(0, 1)).argmax(-1).unflatten(0, exits.shape[:2])
        agreed = ((said == full) & true).flatten(1).sum(1)
        self.state.work.syncs += 1
        *counts, seen = torch.cat((agreed, true.sum()[None])).tolist()
        memory = self.settings.memory
        self.seen = memory * self.seen + seen
        self.agreed = [memory * a + c for a, c in zip(self.agreed, counts, strict=True)]


def _by_layer(exits: dict[int, Tensor]) -> list[Tensor]:
    return [exits[l] for l in sorted(exits)]
