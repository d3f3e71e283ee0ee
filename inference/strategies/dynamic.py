"""Self-speculative decoding that chooses E, d and branch anew in every round.

DEL (arXiv 2504.05598). With a_E the probability that the exit after E layers agrees with the last
layer, a round that drafts d tokens with E layers gives 1 + a_E + ... + a_E^d tokens on average
(Leviathan et al., arXiv 2211.17192, eq. 1) and costs d c_E + v_E full steps. The pair of largest
  (1 + a_E + ... + a_E^d) / (d c_E + v_E)      (TPL, with costs instead of layers)
is taken, with leaves where those are worth their cost (`best_shape`); `tune` measures the costs and
selects the exits. Every round updates a_E of the exit that
drafted. In some rounds all exits are probed: verification has their states of the round's tokens at
hand, and the head runs on them ("shadow tokens"). For sampled tokens agreement is the chance that a
draft is accepted. N-gram drafts cost
nothing: they come first where their own agreement is higher, and the exits' agreement is then that
of tokens without a lookup, as exits draft no others.
"""

from dataclasses import dataclass
from typing import ClassVar

from inference.engine.decoder import Decoder
from inference.engine.state import DecodeState
from inference.engine.strategy import Strategy, exit_list_problems
from inference.strategies.agreement import cost_problems, parameter_cost
from inference.strategies.dynamic_rounds import Rounds
from inference.strategies.self_speculative import draft_problems
from inference.strategies.tree import check_branch
from models.config import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Dynamic(Strategy):
    """Draft up to d tokens with the E layers that pay most, then verify them with the rest."""

    name: ClassVar[str] = "dynamic"
    measured: ClassVar[tuple[str, ...]] = (
        "draft_costs",
        "verify_costs",
        "leaf_costs",
        "lookup_cost",
    )
    d: int = 6
    """Most tokens drafted in a round."""
    branch: int = 1
    """Most candidates for each, as in self_speculative."""
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
    leaf_costs: tuple[float, ...] | None = None
    """Cost of having leaves in a round, further candidates, and of each, in full steps; they are
    free if not given."""
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
        found += self.below(1, d="drafted token", branch="candidate")
        found += self.below(1, probe="round", longest_probe="round")
        if not 0.0 < self.memory < 1.0:
            found.append(f"memory: {self.memory}, give a number between 0 and 1")
        exits = self._exits(n_layers)
        if n_layers > 1:
            found += exit_list_problems(self.name, exits, n_layers)
        found += cost_problems("draft_costs", self.draft_costs, (len(exits),))
        found += cost_problems("verify_costs", self.verify_costs, (1, len(exits)))
        found += cost_problems("leaf_costs", self.leaf_costs, (2,))
        found += cost_problems("lookup_cost", (self.lookup_cost,), (1,))
        if not self.ngram:
            found += self.unused_settings("lookup_cost", without="ngram")
        if self.branch == 1:
            found += self.unused_settings("leaf_costs", without="branch")
        return found + draft_problems(self.stop, self.stop_entropy, self.ngram)

    def _exits(self, n_layers: int) -> tuple[int, ...]:
        return tuple(range(1, n_layers)) if self.exits is None else self.exits

    def costs(self, config: LlamaConfig) -> tuple[dict[int, float], dict[int, float]]:
        """Return c_E and v_E by E."""
        exits = self._exits(config.n_layers)
        draft = self.draft_costs or [parameter_cost(config, E) for E in exits]
        verify = self.verify_costs * (len(exits) // len(self.verify_costs))
        return dict(zip(exits, draft, strict=True)), dict(zip(exits, verify, strict=True))

    def spare_slots(self, slots: int) -> int:
        return min(self.d, slots - 1) * (self.branch - 1)

    def start(self, state: DecodeState) -> Decoder:
        check_branch(self.branch, state.model.config.vocab_size)
        return Rounds(self, state)
