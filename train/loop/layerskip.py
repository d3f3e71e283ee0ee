"""The LayerSkip recipe at step t: drop probabilities, exits and their weights."""

from dataclasses import dataclass

from loss.curriculum import CurriculumConfig, active_layers
from loss.early_exit import EarlyExitConfig, exit_weights
from loss.state_distillation import StatePair, state_pairs
from models.config import LlamaConfig
from models.layer_dropout import LayerDropoutConfig, p


@dataclass(frozen=True)
class StepPlan:
    """The recipe at one step. Layers l count from 0; the exit after layer l reads x_{l+1}."""

    drop_prob: tuple[float, ...]
    """p(l, t) = S(t) D(l) p_max of each layer."""
    exit_layers: tuple[int, ...]
    """The layers l with C(t, l) = 1 and a loss, ascending."""
    exit_weights: dict[int, float]
    """{l: e_tilde(t, l)}, or the weights of another recipe."""
    token_fraction: float = 1.0
    """Share of the tokens that the exits before the last learn from."""
    state_pairs: tuple[StatePair, ...] = ()
    """The pairs of layers whose hidden states are distilled."""

    @property
    def hidden_layers(self) -> frozenset[int]:
        """The layers l whose norm(x_{l+1}) the loss reads."""
        return frozenset(self.exit_layers).union(*self.state_pairs)

    @property
    def mean_layers(self) -> float:
        """Expected number of layers that a token runs, up to the deepest that the loss reads."""
        run = self.drop_prob[: max(self.hidden_layers, default=-1) + 1]
        return len(run) - sum(run)

    def num_own_exits(self, model: LlamaConfig) -> int:
        """Return the number of exits with own parts."""
        return sum(l + 1 in model.own_exits for l in self.exit_layers)

    @property
    def mean_exits(self) -> float:
        """Mean number of exits at which a token has a loss."""
        return 1.0 + self.token_fraction * (len(self.exit_layers) - 1)


@dataclass(frozen=True, kw_only=True)
class LayerSkipSchedule:
    """Binds S, D, p_max, C, R and e_scale to L layers and T steps: a pure function of t."""

    layer_dropout: LayerDropoutConfig
    curriculum: CurriculumConfig
    early_exit: EarlyExitConfig
    L: int
    T: int
    trained_exits: tuple[int, ...] | None = None
    """E of the exits that learn, where nothing else does; the others then have no loss, but for the
    last layer if it is their teacher. None: everything learns."""

    @property
    def monitored_layer(self) -> int:
        """The layer l whose loss is monitored for spikes: the last, or the deepest that learns."""
        if self.trained_exits is None:
            return self.L - 1
        on = self.early_exit.exits or self.trained_exits
        return max((E - 1 for E in self.trained_exits if E in on), default=self.L - 1)

    def at(self, t: int) -> StepPlan:
        """Return the plan of step t."""
        active = active_layers(t, L=self.L, T=self.T, config=self.curriculum)
        weights = exit_weights(active, t, self.L, self.early_exit)
        if self.trained_exits is not None:
            kept = {*self.trained_exits, *((self.L,) if self.early_exit.distill else ())}
            weights = {l: weight for l, weight in weights.items() if l + 1 in kept}
        return StepPlan(
            drop_prob=tuple(
                p(l, t, L=self.L, T=self.T, config=self.layer_dropout) for l in range(self.L)
            ),
            exit_layers=tuple(weights),
            exit_weights=weights,
            token_fraction=self.early_exit.token_fraction,
            state_pairs=state_pairs(
                self.L, max(self.early_exit.exits, default=0), self.early_exit.distill_states
            ),
        )
