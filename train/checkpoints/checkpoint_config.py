"""When checkpoints are written and how many are kept; what a run starts from."""

from dataclasses import dataclass
from typing import Literal

from data.urls import location


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and what a new run starts from."""

    folder: str = ""
    """Folder of the checkpoints of all runs, on another disk or by URL, such as s3://bucket/runs;
    those of this run are in folder/name. Empty: `checkpoints` in the run folder."""
    interval_steps: int = 500
    """Steps between checkpoints; the last step always writes one. 0: only the last."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written. Each rank then keeps a copy of its part of
    the weights and moments in host memory."""
    keep_latest: int = 3
    """Finished checkpoints to keep; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps divisible by this are never deleted. 0: none."""
    max_failures: int = 3
    """Checkpoints in a row that fail, as on a full disk, until the run stops. A failure of the last
    one of a run stops it at once."""
    final_model: Literal["none", "float32", "bfloat16"] = "none"
    """Also write the weights alone to the run's folder `model` at the end, in this dtype."""
    allow_config_changes: bool = False
    """Resume also where fields of the configuration that affect the result have changed. Steps,
    batch size, sequence length, packing, weights and sources need only be given."""
    init_from: str = ""
    """Run or checkpoint folder, or its URL, whose weights a new run starts from (continual
    training, finetuning). Empty: random weights. A run with checkpoints of its own resumes from
    them."""
    allow_other_tokenizer: bool = False
    """Start from the weights of init_from also where they learnt other tokens than the dataset's,
    so that an id stands for another text than the weights learnt it for."""
    resume_from: str = ""
    """Run or checkpoint folder that a new run branches off: it goes on with its weights, moments,
    step and rows, such as a decay from a step of a constant learning rate. Any field but the shape
    of the model may differ. A run with checkpoints of its own resumes from them."""
    step: int = 0
    """The step of `resume_from` to branch off. 0: its newest."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        limits = {"interval_steps": 0, "keep_latest": 0, "keep_every_steps": 0}
        limits |= {"max_failures": 1, "step": 0}
        found = [
            f"checkpoint.{name}: {getattr(self, name)}, must be at least {least}"
            for name, least in limits.items()
            if getattr(self, name) < least
        ]
        if self.step and not self.resume_from:
            found.append(
                f"checkpoint.step: {self.step} without checkpoint.resume_from, name the run to "
                "branch off"
            )
        try:
            location(self.folder)
        except ValueError as error:
            found.append(f"checkpoint.folder: {error}")
        return found

    @property
    def starts_from(self) -> str:
        """The run that a new one starts from; empty: none."""
        return self.resume_from or self.init_from
