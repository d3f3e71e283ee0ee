"""The rounds of `dynamic`: drafts of the shape that pays most by the agreement seen so far."""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.engine.batch import Round
from inference.engine.candidates import acceptance_chances
from inference.engine.state import DecodeState
from inference.strategies.agreement import (
    Agreement,
    Shape,
    best_shape,
    count_agreed_drafts,
    count_agreed_exits,
    count_agreed_leaves,
    count_agreed_lookups,
)
from inference.strategies.autoregressive import decode_one
from inference.strategies.drafting import Draft, NgramDrafts, Stop, draft, lookup_drafts
from inference.strategies.self_speculative import accept_round, run_verifier_layers, verify
from inference.strategies.tree import accept_tree, verify_tree
from models.host_copy import HostCopy
from models.llama import NOTHING

if TYPE_CHECKING:
    from inference.strategies.dynamic import Dynamic


@dataclass
class Rounds:
    """The rounds of one generation, and the agreement observed in them."""

    settings: "Dynamic"
    state: DecodeState
    probe_interval: int = 1
    """Rounds from the last probe to the next."""
    num_probes: int = 0
    """Probes so far."""
    rounds_to_probe: int = 1
    """Rounds until the next probe."""
    exits: dict[int, Agreement] = field(init=False)
    """By E."""
    leaves: dict[int, list[Agreement]] = field(init=False)
    """By E, of the leaves of each rank, where no candidate before them agreed."""
    lookups: Agreement = field(init=False)
    rounds: int = 0
    """Rounds so far."""
    pending_stats: deque[tuple[int, list[Agreement], HostCopy]] = field(default_factory=deque)
    """Counts the host has not read: the round, the estimates, and (agreed, tried) for each."""
    draft_costs: dict[int, float] = field(init=False)
    verify_costs: dict[int, float] = field(init=False)
    leaf_costs: tuple[float, float] = field(init=False)
    shapes: dict[int, Shape] = field(default_factory=dict)
    """The best by the largest d, cached until counts are read."""

    def __post_init__(self) -> None:
        settings = self.settings
        self.draft_costs, self.verify_costs = settings.costs(self.state.model.config)
        any_leaves, each_leaf = settings.leaf_costs or (0.0, 0.0)
        self.leaf_costs = any_leaves, each_leaf
        self.exits = {E: Agreement(settings.memory) for E in self.draft_costs}
        self.leaves = {
            E: [Agreement(settings.memory) for _ in range(1, settings.branch)] for E in self.exits
        }
        self.lookups = Agreement(settings.memory)

    def __call__(self, max_tokens: int) -> Round:
        """Draft, verify, accept; in some rounds, probe all exits as well."""
        self.rounds += 1
        self.read_stats(self.rounds - 1)
        max_d = min(self.settings.d, max_tokens - 1)
        lookups = lookup_drafts(self.state, self.settings.ngram, max_d)
        without, having = self._count_lookups(lookups)
        shape = self._shape(max_d)
        used = lookups if having and self._lookups_pay(without, having, shape, max_d) else None
        if used is not None and not without:
            result = self._verify(used.as_draft())
        else:
            result = self._draft_and_verify(shape, used, max_tokens)
            result = replace(result, most_drafted=shape.d or None)
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
            self.shapes.clear()

    def _count_lookups(self, lookups: NgramDrafts | None) -> tuple[int, int]:
        """Return the number of unfinished rows without a lookup, and with one."""
        if lookups is None:
            return 1, 0
        live = ~self.state.batch.finished
        without, having = (live & ~lookups.found).sum(), (live & lookups.found).sum()
        rows_without, rows_having = self.state.sync_list(torch.stack((without, having)))
        return rows_without, rows_having

    def _lookups_pay(self, without: int, having: int, shape: Shape, max_d: int) -> bool:
        """Return whether lookups are worth drafting in the rows that have one.

        Beside rows that draft with layers they cost nothing more; otherwise all rows pay
        for a verification, also those that get one token of it.
        """
        a = self.lookups.lower_bound()
        if without and shape.d:
            return a > self.exits[shape.E].lower_bound()
        tokens = having * sum(a**i for i in range(max_d + 1)) + without
        cost = (having + without) * self.settings.lookup_cost
        return tokens / cost > shape.gain

    def _draft_and_verify(
        self, shape: Shape, lookups: NgramDrafts | None, max_tokens: int
    ) -> Round:
        """Draft in the rows without a lookup, and verify; a probe has no leaves."""
        state, finished, probing = self.state, self.state.batch.finished, self._probe_is_due()
        E, d, branch, _ = shape
        branch = 1 if probing else branch
        if not d and lookups is None and not probing:
            return decode_one(state, state.model.config.n_layers, NOTHING, max_tokens)
        if not d and lookups is not None:
            # Where drafting with layers does not pay, lookups in some rows are better than none.
            drafted = lookups.as_draft()
        else:
            stop = Stop(self.settings.stop, self.settings.stop_entropy)
            tapped = tuple(other - 1 for other in self.exits if other < E) if probing else ()
            drafted = draft(state, E, d, stop=stop, tapped=tapped, lookups=lookups, branch=branch)
        rows = ~finished if lookups is None else ~(finished | lookups.found)
        if probing:
            return self._verify_and_probe(E, drafted, rows)
        if drafted.leaves is not None:
            result = accept_tree(state, drafted, verify_tree(state, E, drafted))
            self._record(self.leaves[E][: branch - 1], count_agreed_leaves(result, rows, branch))
        else:
            result = self._verify(drafted, E)
        if drafted.exits:
            self._record([self.exits[E]], count_agreed_drafts(result, rows)[None])
        return result

    def _verify(self, drafted: Draft, E: int = 0) -> Round:
        """Verify drafts of E layers, or n-gram drafts alone."""
        return accept_round(
            self.state, drafted, verify(self.state, E if drafted.exits else 0, drafted)
        )

    def _shape(self, max_d: int) -> Shape:
        """Return the best shape by the agreement so far."""
        if max_d not in self.shapes:
            agreement = {
                E: [each.lower_bound() for each in (first, *self.leaves[E])]
                for E, first in self.exits.items()
            }
            self.shapes[max_d] = best_shape(
                agreement, self.draft_costs, self.verify_costs, self.leaf_costs, max_d
            )
        return self.shapes[max_d]

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
        chances = acceptance_chances(q, p.expand_as(q), self.settings.branch, self.state.generator)
        estimates = [each for E in self.exits for each in (self.exits[E], *self.leaves[E])]
        self._record(estimates, count_agreed_exits(chances, counts).flatten(0, 1))
