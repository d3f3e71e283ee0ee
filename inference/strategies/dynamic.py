"""Self-speculative decoding that chooses E and d anew in every round.

DEL (arXiv 2504.05598). With a_E the probability that the exit after E layers agrees with the last
layer, a round that drafts d tokens with E layers gives 1 + a_E + ... + a_E^d tokens on average
(Leviathan et al., arXiv 2211.17192, eq. 1) and costs d c_E + v_E full steps. The pair of largest
  (1 + a_E + ... + a_E^d) / (d c_E + v_E)      (TPL, with costs instead of layers)
is taken; `tune` measures the costs and selects the exits. Every round updates a_E of the exit that
drafted. In some rounds all exits are probed: verification has their states of the round's tokens at
hand, and the head runs on them ("shadow tokens"). For sampled tokens agreement is the chance that a
draft is accepted, sum_x min(p(x), q(x)) (Leviathan et al., corollary 3.6). N-gram drafts cost
nothing: they come first where their own agreement is higher, and the exits' agreement is then that
of tokens without a lookup, as exits draft no others.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy, exit_list_problems
from inference.strategies.agreement import (
    Agreement,
    best_pair,
    cost_problems,
    count_agreed_drafts,
    count_agreed_lookups,
    parameter_cost,
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
    """Draft up to d tokens with the E layers that pay most, then verify them with the rest."""

    name: ClassVar[str] = "dynamic"
    measured: ClassVar[tuple[str, ...]] = ("draft_costs", "verify_costs", "lookup_cost")
    d: int = 6
    """Most tokens drafted in a round."""
    probe: int = 8
    """Rounds at first in each of which all exits are probed for their agreement; from then on the
    interval between probes doubles. Rounds of n-gram drafts alone do not count."""
    longest_probe: int = 64
    """Longest interval between probes, in rounds: a probe runs the head on every exit."""
    memory: float = 0.95
    """Weight an observation of agreement keeps when the next comes."""
    exits: tuple[int, ...] | None = None
    """The E to choose among, ascending; all if not given."""
    draft_costs: tuple[float, ...] | None = None
    """c_E of each of these exits, the cost of a drafted token in full steps of one token; by the
    number of parameters, the LM head's included, if not given."""
    verify_costs: tuple[float, ...] = (1.0,)
    """v_E of each of these exits, the rest of a round: the pending token, verifying, accepting;
    or one for all."""
    lookup_cost: float = 1.0
    """Cost of a round of n-gram drafts alone, in full steps."""
    stop: float = 0.0
    """As in self_speculative."""
    stop_entropy: float = float("inf")
    """As in self_speculative."""
    ngram: int = 0
    """As in self_speculative, where lookups have agreed often enough."""

    @property
    def lossless(self) -> bool:
        return True

    def problems(self, n_layers: int) -> list[str]:
        found = []
        if n_layers == 1:
            found.append(f"strategy: {self.name} needs 2 layers and this model has 1, leave it out")
        found += self.below(1, d="drafted token", probe="round", longest_probe="round")
        if not 0.0 < self.memory < 1.0:
            found.append(f"memory: {self.memory}, give a number between 0 and 1")
        exits = self._exits(n_layers)
        if n_layers > 1:
            found += exit_list_problems(self.name, exits, n_layers)
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
        draft = self.draft_costs or [parameter_cost(config, E) for E in exits]
        verify = self.verify_costs * (len(exits) // len(self.verify_costs))
        return dict(zip(exits, draft, strict=True)), dict(zip(exits, verify, strict=True))

    def start(self, state: DecodeState) -> Decoder:
        return _Rounds(self, state)


@dataclass
class _Rounds:
    """The rounds of one generation, and the agreement observed in them."""

    settings: Dynamic
    state: DecodeState
    probe_interval: int = 1
    """Rounds from the last probe to the next."""
    num_probes: int = 0
    """Probes so far."""
    rounds_to_probe: int = 1
    """Rounds until the next probe."""
    exits: dict[int, Agreement] = field(init=False)
    """By E."""
    lookups: Agreement = field(init=False)
    rounds: int = 0
    """Rounds so far."""
    pending_stats: deque[tuple[int, list[Agreement], HostCopy]] = field(default_factory=deque)
    """Counts the host has not read: the round, the estimates, and (agreed, tried) for each."""
    draft_costs: dict[int, float] = field(init=False)
    verify_costs: dict[int, float] = field(init=False)
    pairs: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    """The best pair by the largest d, cached until counts are read."""

    def __post_init__(self) -> None:
        settings = self.settings
        self.draft_costs, self.verify_costs = settings.costs(self.state.model.config)
        self.exits = {E: Agreement(settings.memory) for E in self.draft_costs}
        self.lookups = Agreement(settings.memory)

    def __call__(self, max_tokens: int) -> Round:
        """Draft, verify, accept; in some rounds, probe all exits as well."""
        self.rounds += 1
        self.read_stats(self.rounds - 1)
        max_d = min(self.settings.d, max_tokens - 1)
        lookups = lookup_drafts(self.state, self.settings.ngram, max_d)
        without, having = self._count_lookups(lookups)
        E, d, _ = self._pair(max_d)
        used = lookups if having and self._lookups_pay(without, having, E, d, max_d) else None
        if used is not None and not without:
            result = self._verify(used.as_draft())
        else:
            result = self._draft_and_verify(E, d, used, max_tokens)
            result = replace(result, most_drafted=d or None)
        if lookups is not None:
            stats = count_agreed_lookups(lookups, result, ~self.state.batch.finished)
            self._record([self.lookups], stats[None])
        return result

    def _record(self, estimates: list[Agreement], stats: Tensor) -> None:
        """Copy counts to the host without waiting: (n, 2), agreed and tried of n estimates."""
        self.pending_stats.append((self.rounds, estimates, HostCopy(stats)))

    def read_stats(self, before: int) -> None:
        """Add the counts of rounds before round `before` to their estimates.

        Those of the last round are left for later, so that the host need not wait for the device.
        """
        while self.pending_stats and self.pending_stats[0][0] < before:
            _, estimates, stats = self.pending_stats.popleft()
            for agreement, (agreed, tried) in zip(estimates, stats.read(), strict=True):
                if tried:
                    agreement.add(agreed, tried)
            self.pairs.clear()

    def _count_lookups(self, lookups: NgramDrafts | None) -> tuple[int, int]:
        """Return the number of unfinished rows without a lookup, and with one."""
        if lookups is None:
            return 1, 0
        live = ~self.state.batch.finished
        without, having = (live & ~lookups.found).sum(), (live & lookups.found).sum()
        rows_without, rows_having = self.state.sync_list(torch.stack((without, having)))
        return rows_without, rows_having

    def _lookups_pay(self, without: int, having: int, E: int, d: int, max_d: int) -> bool:
        """Return whether lookups are worth drafting in the rows that have one.

        Beside rows that draft d tokens with E layers they cost nothing more; otherwise all rows pay
        for a verification, also those that get one token of it.
        """
        a = self.lookups.lower_bound()
        if without and d:
            return a > self.exits[E].lower_bound()
        tokens = having * sum(a**i for i in range(max_d + 1)) + without
        cost = (having + without) * self.settings.lookup_cost
        return tokens / cost > self._pair(max_d)[2]

    def _draft_and_verify(
        self, E: int, d: int, lookups: NgramDrafts | None, max_tokens: int
    ) -> Round:
        """Draft in the rows without a lookup, and verify."""
        state, finished, probing = self.state, self.state.batch.finished, self._probe_is_due()
        if not d and lookups is None and not probing:
            return decode_one(state, state.model.config.n_layers, NOTHING, max_tokens)
        if not d and lookups is not None:
            # Where drafting with layers does not pay, lookups in some rows are better than none.
            drafted = lookups.as_draft()
        else:
            stop = Stop(self.settings.stop, self.settings.stop_entropy)
            tapped = tuple(other - 1 for other in self.exits if other < E) if probing else ()
            drafted = draft(state, E, d, stop=stop, tapped=tapped, lookups=lookups)
        rows = ~finished if lookups is None else ~(finished | lookups.found)
        if probing:
            return self._verify_and_probe(E, drafted, rows)
        result = self._verify(drafted, E)
        if drafted.exits:
            self._record([self.exits[E]], count_agreed_drafts(result, rows)[None])
        return result

    def _verify(self, drafted: Draft, E: int = 0) -> Round:
        """Verify drafts of E layers, or n-gram drafts alone."""
        return accept_round(
            self.state, drafted, verify(self.state, E if drafted.exits else 0, drafted)
        )

    def _pair(self, max_d: int) -> tuple[int, int, float]:
        """Return the best E and d, and their tokens per full step, by the agreement so far."""
        if max_d not in self.pairs:
            agreement = {E: estimate.lower_bound() for E, estimate in self.exits.items()}
            self.pairs[max_d] = best_pair(agreement, self.draft_costs, self.verify_costs, max_d)
        return self.pairs[max_d]

    def _probe_is_due(self) -> bool:
        """Count a round, and return whether all exits are probed in it."""
        self.rounds_to_probe -= 1
        if self.rounds_to_probe > 0:
            return False
        self.num_probes += 1
        if self.num_probes >= self.settings.probe:
            self.probe_interval = min(2 * self.probe_interval, self.settings.longest_probe)
        self.rounds_to_probe = self.probe_interval
        return True

    def _verify_and_probe(self, E: int, drafted: Draft, rows: Tensor) -> Round:
        """Verify a draft, and run the head on the states at all exits.

        Args:
            E: Layers that drafted, if any did.
            drafted: With the states at the exits below that.
            rows: (batch,) bool, rows that count.
        """
        state = self.state
        first = E if drafted.exits else 0
        above = [other for other in self.exits if other > first]
        x_L, deep = run_verifier_layers(state, first, drafted, tuple(other - 1 for other in above))
        p = state.filtered(state.logits(x_L))
        result = accept_round(state, drafted, p)
        exits = {other: deep[other - 1] for other in above}
        n = drafted.tokens.shape[1] + 1
        if drafted.exits:
            n = len(drafted.exits)
            below = {l + 1: [taps[l] for taps in drafted.taps] for l in drafted.taps[0]}
            states = {**below, E: drafted.exits}
            exits = {other: torch.cat(xs, dim=1) for other, xs in states.items()} | exits
        read = [state.before_head(exits[other][:, :n], other) for other in self.exits]
        counts = (torch.arange(n, device=x_L.device) <= result.accepted[:, None]) & rows[:, None]
        self._probe_exits(torch.stack(read), p[:, :n], counts)
        return result

    def _probe_exits(self, exits: Tensor, p: Tensor, counts: Tensor) -> None:
        """Record the agreement of each exit with the last layer.

        Args:
            exits: (exits, batch, n, dim), the head's input at each E.
            p: (batch, n, vocab), the last layer's distributions.
            counts: (batch, n) bool, tokens that count: those after accepted ones.
        """
        q = self.state.filtered(self.state.head(exits.flatten(0, 1)))
        q = q.unflatten(0, exits.shape[:2])
        if self.state.generator is None:
            overlap = (p.argmax(-1) == q.argmax(-1)).float()  # (exits, batch, n)
        else:
            overlap = torch.minimum(p, q).sum(-1)
        agreed = (overlap * counts).flatten(1).sum(1)
        tried = counts.sum().expand_as(agreed)
        self._record([*self.exits.values()], torch.stack((agreed, tried), dim=1))
