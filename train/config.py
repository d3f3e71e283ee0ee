"""The configuration of a run: composed of what each room declares, checked as a whole."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loss.curriculum import CurriculumConfig
from loss.early_exit import EarlyExitConfig
from models.layer_dropout import LayerDropoutConfig
from models.llama import LlamaConfig
from train.checkpointer import CheckpointConfig
from train.corpus import DataConfig
from train.metrics import MetricsConfig
from train.optim import OptimConfig
from train.parallelize import ParallelConfig
from train.runtime import RuntimeConfig
from train.validate import ValidateConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run."""

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
    """Fixes weights, data order and layer dropout."""
    layer_dropout: LayerDropoutConfig = field(default_factory=LayerDropoutConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    early_exit: EarlyExitConfig = field(default_factory=EarlyExitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    def problems(self, world_size: int) -> list[str]:
        """Return all that is wrong with the configuration, one line each."""
        found = [
            *self.model.problems(),
            *self.data.problems(world_size),
            *self.optim.problems(),
            *self.layer_dropout.problems(),
            *self.curriculum.problems(),
            *self.early_exit.problems(),
            *self.parallel.problems(world_size),
            *self.validate.problems(),
            *self.checkpoint.problems(),
            *self.metrics.problems(),
        ]
        if self.steps < 1:
            found.append(f"steps: {self.steps}, must be at least 1")
        if self.seed < 0:
            found.append(f"seed: {self.seed}, must not be negative")
        if not self.name or "/" in self.name or self.name.startswith("."):
            found.append(f"name: {self.name!r}, must be a plain folder name")
        if self.data.seq_len > self.model.max_seq_len:
            found.append(
                f"data.seq_len: {self.data.seq_len} is longer than model.max_seq_len "
                f"{self.model.max_seq_len}, shorten one or raise the other"
            )
        rotation = self.curriculum
        rotates_alone = rotation.C == "rot" and not rotation.last_layer_always_on
        if rotates_alone and self.model.n_layers < rotation.R:
            found.append(
                f"curriculum.R: {rotation.R} is more than model.n_layers {self.model.n_layers}, "
                "which leaves steps without a loss, lower it or set "
                "curriculum.last_layer_always_on"
            )
        return found

    def check(self, world_size: int) -> None:
        """Raise a ValueError with every problem, one line each, if there is any."""
        if found := self.problems(world_size):
            raise ValueError("\n".join(found))

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration as JSON would hold it."""
        resolved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return resolved
