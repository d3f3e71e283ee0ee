"""The configuration of a run, composed of its parts' configurations and checked as a whole."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.urls import Location, location
from loss.curriculum import CurriculumConfig, active_layers, period
from loss.density import DensityConfig
from loss.early_exit import EarlyExitConfig, exit_weights
from models.config import LlamaConfig
from models.layer_dropout import LayerDropoutConfig
from models.router import RouterConfig
from models.token_depth import TokenDepthConfig
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.decoding.speculation_config import SpeculationConfig
from train.loop.data_config import DataConfig
from train.loop.layerskip import LayerSkipSchedule
from train.loop.recovery import RecoveryConfig
from train.loop.step import StepConfig
from train.loop.validate import ValidateConfig
from train.monitoring.adam_monitor import AdamMonitorConfig
from train.monitoring.replica_check import ReplicaCheckConfig
from train.monitoring.stragglers import StragglerConfig
from train.optimizer.optim import OptimConfig
from train.parallel.blocks import float8_problems
from train.parallel.parallelize import ParallelConfig
from train.parallel.runtime import RuntimeConfig
from train.run_folder.metrics import MetricsConfig
from train.run_folder.preflight import name_problems
from train.run_folder.profiler import ProfileConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a training run."""

    name: str
    """Name of the run; its folder is output_dir/name. The same name again resumes."""
    steps: int
    """Optimizer steps, T."""
    model: LlamaConfig
    data: DataConfig
    optim: OptimConfig
    output_dir: str = "outputs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of initial weights, data order and layer dropout."""
    layer_dropout: LayerDropoutConfig = field(default_factory=LayerDropoutConfig)
    token_depth: TokenDepthConfig = field(default_factory=TokenDepthConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    early_exit: EarlyExitConfig = field(default_factory=EarlyExitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    adam_monitor: AdamMonitorConfig = field(default_factory=AdamMonitorConfig)
    replica_check: ReplicaCheckConfig = field(default_factory=ReplicaCheckConfig)
    stragglers: StragglerConfig = field(default_factory=StragglerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    @property
    def checkpoint_folder(self) -> Location:
        """The folder of the run's checkpoints."""
        folder = self.checkpoint.folder
        return location(folder) / self.name if folder else self.run_dir / "checkpoints"

    @property
    def step_config(self) -> StepConfig:
        """The configuration of `train_step`."""
        return StepConfig(
            seed=self.seed,
            T=self.steps,
            optim=self.optim,
            layer_dropout=self.layer_dropout,
            token_depth=self.token_depth,
            early_exit=self.early_exit,
            capacity=self.router.capacity,
            density=self.density,
            reduce_every_microbatch=self.parallel.reduce_every_microbatch,
            reshard_after_forward=self.parallel.reshard_after_forward,
        )

    @property
    def layerskip(self) -> LayerSkipSchedule:
        """The recipe of every step."""
        return LayerSkipSchedule(
            layer_dropout=self.layer_dropout,
            curriculum=self.curriculum,
            early_exit=self.early_exit,
            L=self.model.n_layers,
            T=self.steps,
            trained_exits=self.model.own_exits if self.optim.trains == "exits" else None,
        )

    def problems(self, world_size: int) -> list[str]:
        """Return all that is wrong with the configuration, one line each."""
        if found := self._not_finite():  # The other checks compare numbers.
            return found
        found = [
            *self.model.problems(),
            *self.data.problems(world_size),
            *self.optim.problems(),
            *self.layer_dropout.problems(),
            *self.token_depth.problems(self.model.n_layers),
            *self.router.problems(),
            *self.density.problems(),
            *self.curriculum.problems(),
            *self.early_exit.problems(),
            *self.parallel.problems(world_size),
            *self.validate.problems(),
            *self.speculation.problems(self.model.n_layers),
            *self.checkpoint.problems(),
            *self.recovery.problems(),
            *self.metrics.problems(),
            *self.adam_monitor.problems(),
            *self.replica_check.problems(),
            *self.stragglers.problems(),
            *self.profile.problems(self.steps),
            *self.runtime.problems(),
            *name_problems(self.name),
        ]
        if self.parallel.float8:
            found += float8_problems(self.model)
        if self.steps < 1:
            found.append(f"steps: {self.steps}, must be at least 1")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed: {self.seed}, must lie in [0, 2^63)")
        found += self._conflicts()
        if not found:
            found += self._empty_steps()
        return found

    def _not_finite(self) -> list[str]:
        """Return a line for each field that is or holds an infinity or a NaN."""
        found = []
        for name, value in flat_fields(self.as_dict()):
            numbers = value if isinstance(value, list) else [value]
            bad = [x for x in numbers if isinstance(x, float) and not math.isfinite(x)]
            if bad:
                found.append(f"{name}: {bad[0]}, must be a finite number")
        return found

    def _conflicts(self) -> list[str]:
        """Return a line for each conflict between parts of the configuration."""
        found = self._exit_problems()
        follows_prompts = self.token_depth.kind in ("unified", "skipdecode")
        if follows_prompts and self.data.packing == "documents" and not self.data.mask_documents:
            found.append(
                f"token_depth.kind: {self.token_depth.kind} counts from each document's beginning, "
                "set data.mask_documents to True"
            )
        if self.model.router == "none" and (self.router.capacity < 1 or self.density.weight > 0):
            found.append(
                "router.capacity, density.weight: given for a model without routers, leave them "
                "out or set model.router to linear or mlp"
            )
        if self.optim.trains == "exits" and not self.model.own_exits:
            found.append(
                "optim.trains: exits, but no exit of the model has parts of its own, set "
                "model.own_exits"
            )
        if self.optim.trains == "exits" and not self.checkpoint.starts_from:
            found.append(
                "checkpoint.init_from: empty, but with optim.trains exits all other weights are "
                "frozen, name the run to load them from"
            )
        if self.data.seq_len > self.model.max_seq_len:
            found.append(
                f"data.seq_len: {self.data.seq_len} is longer than model.max_seq_len "
                f"{self.model.max_seq_len}, shorten one or raise the other"
            )
        return found

    def _exit_problems(self) -> list[str]:
        found, exits = [], self.early_exit.exits
        if any(self.model.n_layers <= E for E in exits):
            found.append(
                f"early_exit.exits: {exits}, must be below the model's {self.model.n_layers} layers"
            )
        taught = self.early_exit.distill > 0 or self.early_exit.distill_states != "none"
        if taught and not self.curriculum.last_layer_always_on:
            found.append(
                "curriculum.last_layer_always_on: False, but in distillation the last layer is the "
                "teacher at every step, set it to True"
            )
        return found

    def _empty_steps(self) -> list[str]:
        """Return a line if a step of the curriculum has no loss: no exit learns, or all weigh 0."""
        L, T = self.model.n_layers, self.steps
        for t in range(min(period(self.curriculum), T)):
            active = active_layers(t, L=L, T=T, config=self.curriculum)
            learns = {l + 1 for l in self.layerskip.at(t).exit_layers} & {*self.model.own_exits}
            if self.optim.trains == "exits" and not learns:
                return [
                    f"optim.trains: exits, but at step {t} none of model.own_exits "
                    f"{self.model.own_exits} is on, set curriculum.C to all and name them in "
                    "early_exit.exits"
                ]
            if not any(exit_weights(active, t, L, self.early_exit).values()):
                return [
                    f"curriculum.last_layer_always_on: False leaves step {t} with the exits E = "
                    f"{[l + 1 for l in active]}, whose weights are 0, set it to True or lower "
                    "curriculum.R"
                ]
        return []

    def check(self, world_size: int) -> None:
        """Raise a ValueError if there are problems, with all of them, one line each."""
        if found := self.problems(world_size):
            raise ValueError("\n".join(found))

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration as JSON would hold it."""
        resolved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return resolved


def flat_fields(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested fields by their names, such as optim.lr."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
