"""Self-speculation that chooses E and d anew in every round.

DEL (arXiv 2504.05598). With a_E the probability that the exit after E layers agrees with the last
layer, a round that drafts d tokens with E layers gives 1 + a_E + ... + a_E^d tokens on average
(Leviathan et al., arXiv 2211.17192, eq. 1) and costs d c_E + v full steps. The best pair of
  (1 + a_E + ... + a_E^d) / (d c_E + v)        (TPL, with costs instead of layers)
is taken. What agreement every exit would have had is seen when a round is verified: all layers'
outputs of its tokens are at hand, and the head is put on them ("shadow tokens"). For sampled tokens
agreement is the chance that a draft is accepted, sum_x min(p(x), q(x)) (Leviathan et al., corollary
3.6), here without top_k and top_p.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from inference.autoregressive import decode_one
from inference.drafting import Draft, Stop, draft, guess
from inference.sampling import Sampling, probabilities
from inference.self_speculative import draft_problems, run_the_rest, settle, verify
from inference.state import Decoder, DecodeState, Round
from models.flops import block_params, own_exit_params
from models.llama import NOTHING, SkippedParts


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Draft up to d tokens with the E layers that promise most, then verify them with the rest."""

    name: ClassVar[str] = "dynamic"
    d: int = 6
    """Most tokens drafted in a round."""
    probe: int = 4
    """Rounds from the first look at the agreement of all exits to the second; each gap is twice the
    one before."""
    longest_probe: int = 64
    """Rounds of the longest gap, at least `probe`: a look costs the head of every exit."""
    memory: float = 0.95
    """What weight an observation keeps when the next comes."""
    head_cost: float | None = None
    """Cost of the LM head in layers; by its number of parameters if not given."""
    call_cost: float = 0.0
    """Cost in layers of calling the model once, however few layers are run."""
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
        if self.longest_probe < self.probe:
            found.append(f"longest_probe: {self.longest_probe}, give at least probe, {self.probe}")
        if not 0.0 < self.memory < 1.0:
            found.append(f"memory: {self.memory}, give a number between 0 and 1")
        if self.head_cost is not None and not self.head_cost >= 0.0:
            found.append(f"head_cost: {self.head_cost}, give layers, at least 0")
        if not self.call_cost >= 0.0:
            found.append(f"call_cost: {self.call_cost}, give layers, at least 0")
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
    gap: int = field(init=False)
    """Rounds from the next look to the one after."""
    next_look: int = 1
    """Rounds to go until all exits are looked at."""
    agreed: list[float] = field(init=False)
    """By E - 1: tokens of an exit seen to agree, old ones counting less."""
    seen: float = 2.0
    """Tokens looked at, old ones counting less; at first as if half of two had agreed."""
    draft_costs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Work out what drafting costs."""
        config, settings = self.state.model.config, self.settings
        head = settings.head_cost
        if head is None:
            head = config.dim * config.vocab_size / block_params(config)
        L, beside = config.n_layers, head + settings.call_cost
        own = {E: own_exit_params(config) / len(config.own_exits) for E in config.own_exits}
        layers = [E + own.get(E, 0) / block_params(config) for E in range(1, L)]
        self.draft_costs = [(E + beside) / (L + beside) for E in layers]
        self.agreed = [1.0] * (L - 1)
        self.gap = settings.probe

    def __call__(self, room: int) -> Round:
        """Draft, verify, accept; now and then look at what every exit would have said."""
        settings, state = self.settings, self.state
        agreement = [agreed / self.seen for agreed in self.agreed]
        most = min(settings.d, room - 1)
        E, d = best_pair(agreement, self.draft_costs, settings.verify_cost, most)
        self.next_look -= 1
        probing = self.next_look == 0
        if probing:
            self.next_look = self.gap
            self.gap = min(2 * self.gap, settings.longest_probe)
        drafted = self._draft(E, d, most, tapped=tuple(range(E - 1)) if probing else ())
        if drafted.tokens.shape[1] == 0 and not probing:
            return decode_one(state, state.model.config.n_layers, NOTHING, room)
        first = E if drafted.exits else 0
        if not probing:
            return settle(state, drafted, verify(state, first, drafted))
        return self._verify_and_look(first, drafted)

    def _draft(self, E: int, d: int, most: int, *, tapped: tuple[int, ...]) -> Draft:
        """Draft with E layers, or not at all if guesses serve all rows, or if d = 0."""
        settings, state = self.settings, self.state
        guesses = guess(state, settings.ngram, most)
        if guesses is not None:
            served = guesses.found | state.finished
            # Where layers are not worth their while, guesses for some rows are better than none.
            enough = served.all() if d else (guesses.found & ~state.finished).any()
            if state.ask(enough):
                return guesses.alone()
        stop = Stop(settings.stop, settings.stop_entropy)
        return draft(state, E, d, stop=stop, tapped=tapped, guesses=guesses if d else None)

    def _verify_and_look(self, first: int, drafted: Draft) -> Round:
        """Verify a draft, and put the head on the outputs of all layers.

        Args:
            first: Layers the draft has been through.
            drafted: With the outputs of the layers below those.
        """
        state, L = self.state, self.state.model.config.n_layers
        x_L, deep = run_the_rest(state, first, drafted, tuple(range(first, L - 1)))
        logits = state.logits(x_L)
        result = settle(state, drafted, state.filtered(logits))
        exits = [deep[l] for l in range(first, L - 1)]
        places = drafted.tokens.shape[1] + 1
        if drafted.exits:
            places = len(drafted.exits)
            below = [[taps[l] for taps in drafted.shallow] for l in range(first - 1)]
            exits = [torch.cat(xs, dim=1) for xs in (*below, drafted.exits)] + exits
        read = [state.before_head(x[:, :places], E) for E, x in enumerate(exits, start=1)]
        self._look(torch.stack(read), logits[:, :places], result)
        return result

    def _look(self, exits: Tensor, full: Tensor, result: Round) -> None:
        """Add up how far each exit agrees with the last layer, after tokens that were accepted.

        Args:
            exits: (L - 1, batch, n, dim), what the head reads of x_E for E = 1, ..., L - 1.
            full: (batch, n, vocab), the last layer's logits.
            result: The round.
        """
        state, plain = self.state, Sampling(temperature=self.state.sampling.temperature)
        places = torch.arange(full.shape[1], device=full.device)
        true = (places <= result.accepted[:, None]) & ~state.finished[:, None]
        q = probabilities(state.head(exits.flatten(0, 1)), plain).unflatten(0, exits.shape[:2])
        overlap = torch.minimum(probabilities(full, plain), q).sum(-1)  # (L - 1, batch, n)
        agreed = (overlap * true).flatten(1).sum(1)
        state.work.syncs += 1
        *sums, seen = torch.cat((agreed, true.sum()[None])).tolist()
        memory = self.settings.memory
        self.seen = memory * self.seen + seen
        self.agreed = [memory * a + s for a, s in zip(self.agreed, sums, strict=True)]
