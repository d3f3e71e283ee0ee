"""Self-speculation that chooses E and d anew in every round.

DEL (arXiv 2504.05598). With a_E the probability that the exit after E layers agrees with the last
layer, a round that drafts d tokens with E layers gives 1 + a_E + ... + a_E^d tokens on average
(Leviathan et al., arXiv 2211.17192, eq. 1) and costs d c_E + v_E full steps. The best pair of
  (1 + a_E + ... + a_E^d) / (d c_E + v_E)      (TPL, with costs instead of layers)
is taken; `tune` measures what rounds cost and which exits are worth a look. How far the exit that
drafts agrees, every round tells. What agreement every exit would have had is seen when a round is
verified: the layers' outputs of its tokens are at hand, and the head is put on them ("shadow
tokens"). For sampled tokens agreement is the chance that a draft is accepted, sum_x min(p(x), q(x))
(Leviathan et al., corollary 3.6). N-gram drafts cost nothing: they come first where their own
agreement promises more, and the exits' agreement is then that of the tokens after which there was
no lookup, as exits draft no others.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy, exits_problems
from inference.strategies.agreement import (
    Agreement,
    best_pair,
    by_parameters,
    cost_problems,
    drafts_that_agreed,
    lookups_that_agreed,
)
from inference.strategies.autoregressive import decode_one
from inference.strategies.drafting import Draft, NgramDrafts, Stop, draft, lookup_drafts
from inference.strategies.self_speculative import (
    accept_round,
    draft_problems,
    run_verifier_layers,
    verify,
)
from models.config import LlamaConfig
from models.host_copy import HostCopy
from models.llama import NOTHING


@dataclass(frozen=True, kw_only=True)
class Dynamic(Strategy):
    """Draft up to d tokens with the E layers that promise most, then verify them with the rest."""

    name: ClassVar[str] = "dynamic"
    d: int = 6
    """Most tokens drafted in a round."""
    probe: int = 8
    """Rounds at first in each of which the agreement of all exits is looked at; from then on each
    gap is twice the one before. Rounds of guesses alone do not count."""
    longest_probe: int = 64
    """Rounds of the longest gap: a look costs the head of every exit."""
    memory: float = 0.95
    """What weight an observation keeps when the next comes."""
    exits: tuple[int, ...] | None = None
    """The E to choose among, ascending; all if not given."""
    draft_costs: tuple[float, ...] | None = None
    """c_E of each of these exits, what a drafted token costs, in full steps of one token; by the
    number of parameters, the LM head's included, if not given."""
    verify_costs: tuple[float, ...] = (1.0,)
    """v_E of each of these exits, the rest of a round: the pending token, verifying, accepting;
    or one for all."""
    lookup_cost: float = 1.0
    """Cost of a round of guesses, in full steps."""
    stop: float = 0.0
    """As in self_speculative."""
    stop_entropy: float = float("inf")
    """As in self_speculative."""
    ngram: int = 0
    """As in self_speculative, where guesses have agreed often enough."""

    def problems(self, n_layers: int) -> list[str]:
        """Return what is wrong with the settings."""
        found = []
        if n_layers == 1:
            found.append("strategy: dynamic needs at least 2 layers, this model has 1")
        if self.d < 1:
            found.append(f"d: {self.d}, give at least 1 drafted token")
        if self.probe < 1:
            found.append(f"probe: {self.probe}, give at least 1 round")
        if self.longest_probe < 1:
            found.append(f"longest_probe: {self.longest_probe}, give at least 1 round")
        if not 0.0 < self.memory < 1.0:
            found.append(f"memory: {self.memory}, give a number between 0 and 1")
        exits = self._exits(n_layers)
        if n_layers > 1:
            found += exits_problems(self.name, exits, n_layers)
        found += cost_problems("draft_costs", self.draft_costs, (len(exits),))
        found += cost_problems("verify_costs", self.verify_costs, (1, len(exits)))
        found += cost_problems("lookup_cost", (self.lookup_cost,), (1,))
        if not self.ngram:
            found += self.unused_settings("lookup_cost", without="ngram")
        return found + draft_problems(self.stop, self.stop_entropy, self.ngram)

    def _exits(self, n_layers: int) -> tuple[int, ...]:
        return tuple(range(1, n_layers)) if self.exits is None else self.exits

    def costs(self, config: LlamaConfig) -> tuple[dict[int, float], dict[int, float]]:
        """Return c_E and v_E by E."""
        exits = self._exits(config.n_layers)
        draft = self.draft_costs or [by_parameters(config, E) for E in exits]
        verify = self.verify_costs * (len(exits) // len(self.verify_costs))
        return dict(zip(exits, draft, strict=True)), dict(zip(exits, verify, strict=True))

    def start(self, state: DecodeState) -> Decoder:
        """Begin to decode."""
        return _Rounds(self, state)


@dataclass
class _Rounds:
    """The rounds of one generation, and what they have seen of the exits' agreement."""

    settings: Dynamic
    state: DecodeState
    probe_interval: int = 1
    """Rounds from the last look to the next."""
    num_probes: int = 0
    """Looks so far."""
    rounds_to_probe: int = 1
    """Rounds to go until all exits are looked at."""
    exits: dict[int, Agreement] = field(init=False)
    """By E."""
    guesses: Agreement = field(init=False)
    rounds: int = 0
    """Rounds so far."""
    pending_stats: deque[tuple[int, list[Agreement], HostCopy]] = field(default_factory=deque)
    """What the host has not read: a round, and of whom it stats (agreed, seen)."""
    draft_costs: dict[int, float] = field(init=False)
    verify_costs: dict[int, float] = field(init=False)
    pairs: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    """The best pair by the most that may be drafted, since something was read."""

    def __post_init__(self) -> None:
        """Begin with what drafts cost, and nothing seen."""
        settings = self.settings
        self.draft_costs, self.verify_costs = settings.costs(self.state.model.config)
        self.exits = {E: Agreement(settings.memory) for E in self.draft_costs}
        self.guesses = Agreement(settings.memory)

    def __call__(self, max_tokens: int) -> Round:
        """Guess or draft, verify, accept; now and then look at what every exit would have said."""
        self.rounds += 1
        self.read_stats(self.rounds - 1)
        most = min(self.settings.d, max_tokens - 1)
        found = lookup_drafts(self.state, self.settings.ngram, most)
        without, having = self._count_lookups(found)
        E, d, _ = self._pair(most)
        guesses = found if having and self._lookups_pay(without, having, E, d, most) else None
        if guesses is not None and not without:
            result = self._verify(guesses.alone())
        else:
            result = self._draft_and_verify(E, d, guesses, max_tokens)
        if found is not None:
            stats = lookups_that_agreed(found, result, ~self.state.batch.finished)
            self._record([self.guesses], stats[None])
        return result

    def _record(self, whom: list[Agreement], stats: Tensor) -> None:
        """Send for what this round stats: (n, 2), agreed and seen of each of n."""
        self.pending_stats.append((self.rounds, whom, HostCopy(stats)))

    def read_stats(self, before: int) -> None:
        """Take in what rounds stats that came before round `before`.

        The last round's is left for later, so that the host need not wait for the device.
        """
        while self.pending_stats and self.pending_stats[0][0] < before:
            _, whom, numbers = self.pending_stats.popleft()
            for agreement, (agreed, seen) in zip(whom, numbers.read(), strict=True):
                if seen:
                    agreement.add(agreed, seen)
            self.pairs.clear()

    def _count_lookups(self, guesses: NgramDrafts | None) -> tuple[int, int]:
        """Return how many of the rows that go on have none, and how many have one."""
        if guesses is None:
            return 1, 0
        live = ~self.state.batch.finished
        without, having = (live & ~guesses.found).sum(), (live & guesses.found).sum()
        rows_without, rows_having = self.state.sync_list(torch.stack((without, having)))
        return rows_without, rows_having

    def _lookups_pay(self, without: int, having: int, E: int, d: int, most: int) -> bool:
        """Return whether rows that have guesses are better off with them.

        Beside rows that draft d tokens with E layers they cost nothing more; otherwise all rows pay
        for a verification, also those that get one token of it.
        """
        a = self.guesses.at_least()
        if without and d:
            return a > self.exits[E].at_least()
        tokens = having * sum(a**i for i in range(most + 1)) + without
        cost = (having + without) * self.settings.lookup_cost
        return tokens / cost > self._pair(most)[2]

    def _draft_and_verify(
        self, E: int, d: int, guesses: NgramDrafts | None, max_tokens: int
    ) -> Round:
        """Draft where there is no guess, and verify."""
        state, probing = self.state, self._probe_is_due()
        if not d and guesses is None and not probing:
            return decode_one(state, state.model.config.n_layers, NOTHING, max_tokens)
        if not d and guesses is not None:
            # Where layers are not worth their while, guesses for some rows are better than none.
            drafted = guesses.alone()
        else:
            stop = Stop(self.settings.stop, self.settings.stop_entropy)
            tapped = tuple(other - 1 for other in self.exits if other < E) if probing else ()
            drafted = draft(state, E, d, stop=stop, tapped=tapped, guesses=guesses)
        rows = ~state.batch.finished if guesses is None else ~(state.batch.finished | guesses.found)
        if probing:
            return self._verify_and_probe(E, drafted, rows)
        result = self._verify(drafted, E)
        if drafted.exits:
            self._record([self.exits[E]], drafts_that_agreed(result, rows)[None])
        return result

    def _verify(self, drafted: Draft, E: int = 0) -> Round:
        """Verify what E layers drafted, or guesses."""
        return accept_round(
            self.state, drafted, verify(self.state, E if drafted.exits else 0, drafted)
        )

    def _pair(self, most: int) -> tuple[int, int, float]:
        """Return the best E and d, and their tokens per full step, by what was seen."""
        if most not in self.pairs:
            agreement = {E: exit_.at_least() for E, exit_ in self.exits.items()}
            self.pairs[most] = best_pair(agreement, self.draft_costs, self.verify_costs, most)
        return self.pairs[most]

    def _probe_is_due(self) -> bool:
        """Count a round, and return whether all exits are looked at in it."""
        self.rounds_to_probe -= 1
        if self.rounds_to_probe > 0:
            return False
        self.num_probes += 1
        if self.num_probes >= self.settings.probe:
            self.probe_interval = min(2 * self.probe_interval, self.settings.longest_probe)
        self.rounds_to_probe = self.probe_interval
        return True

    def _verify_and_probe(self, E: int, drafted: Draft, rows: Tensor) -> Round:
        """Verify a draft, and put the head on the outputs at all exits.

        Args:
            E: Layers that drafted, if any did.
            drafted: With the outputs at the exits below that.
            rows: (batch,) bool, which are looked at.
        """
        state = self.state
        first = E if drafted.exits else 0
        above = [other for other in self.exits if other > first]
        x_L, deep = run_verifier_layers(state, first, drafted, tuple(other - 1 for other in above))
        p = state.filtered(state.logits(x_L))
        result = accept_round(state, drafted, p)
        exits = {other: deep[other - 1] for other in above}
        places = drafted.tokens.shape[1] + 1
        if drafted.exits:
            places = len(drafted.exits)
            below = {l + 1: [taps[l] for taps in drafted.shallow] for l in drafted.shallow[0]}
            seen = {**below, E: drafted.exits}
            exits = {other: torch.cat(xs, dim=1) for other, xs in seen.items()} | exits
        read = [state.before_head(exits[other][:, :places], other) for other in self.exits]
        true = (torch.arange(places, device=x_L.device) <= result.accepted[:, None]) & rows[:, None]
        self._probe_exits(torch.stack(read), p[:, :places], true)
        return result

    def _probe_exits(self, exits: Tensor, p: Tensor, true: Tensor) -> None:
        """Add up how far each exit agrees with the last layer.

        Args:
            exits: (exits, batch, n, dim), what the head reads of x_E for each E.
            p: (batch, n, vocab), the last layer's distributions.
            true: (batch, n) bool, places after tokens that were accepted.
        """
        q = self.state.filtered(self.state.head(exits.flatten(0, 1)))
        overlap = torch.minimum(p, q.unflatten(0, exits.shape[:2])).sum(-1)  # (exits, batch, n)
        agreed = (overlap * true).flatten(1).sum(1)
        self._record(
            [*self.exits.values()], torch.stack((agreed, true.sum().expand_as(agreed)), dim=1)
        )
