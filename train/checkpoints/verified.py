"""Find an intact checkpoint and load it: rank 0 lists, all ranks verify a share of the files.

Where there are some and none verifies, training stops instead of silently starting at step 0.
"""

import logging
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from models.checkpoint_format import (
    Manifest,
    check_content,
    check_listing,
    checkpoint_steps,
)
from models.tensor_reader import TensorReader
from train.checkpoints.content import Tensors
from train.checkpoints.folder import DAMAGED, first_failure, set_aside
from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)


def newest_intact(
    folder: Path, runtime: Runtime, *, last_step: int | None = None
) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies, or None where there is none at all.

    Newer ones, all damaged, are set aside as step-*.damaged, so that they neither count as kept
    nor are verified again. Rank 0 lists the folder; all ranks verify.

    Args:
        folder: The run's checkpoints.
        runtime: This rank.
        last_step: Consider those of at most this many steps; None: all.

    Raises:
        ValueError: On rank 0, if there are checkpoints and every one is damaged.
        SystemExit: On the other ranks then.
    """
    steps = runtime.gather(checkpoint_steps(folder) if runtime.is_main else {})[0]
    eligible = [step for step in steps if last_step is None or step <= last_step]
    damaged: list[Path] = []

    def put_aside() -> None:
        for bad in damaged if runtime.is_main else ():
            set_aside(bad, DAMAGED)

    for step in reversed(eligible):
        path = steps[step]
        found = verify_together(path, runtime)
        if isinstance(found, Manifest) and found.step != step:
            found = f"checkpoint: {path} holds step {found.step}, use another checkpoint"
        if isinstance(found, Manifest):
            runtime.on_every_rank(put_aside)
            return path, found
        if runtime.is_main:
            logger.warning("%s", found)
        damaged.append(path)

    def refuse() -> None:
        if damaged:
            raise ValueError(
                f"checkpoint: none of the {len(damaged)} in {folder} is intact, "
                "remove the folder to start from step 0"
            )

    runtime.on_every_rank(refuse)
    return None


def verify_together(path: Path, runtime: Runtime) -> Manifest | str:
    """Compare a checkpoint with its manifest, each rank reading a share of the files.

    Returns:
        The manifest as rank 0 reads it, or the first problem, the same on every rank.
    """

    def listing() -> Manifest | str:
        try:
            return check_listing(path)
        except (ValueError, OSError) as error:
            return str(error)

    def content(manifest: Manifest) -> str:
        share = sorted(manifest.files)[runtime.rank :: runtime.world_size]
        try:
            check_content(path, manifest, share)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    found = runtime.gather(listing() if runtime.is_main else "")[0]
    if isinstance(found, str):
        return found
    problems = [text for text in runtime.gather(content(found)) if text]
    return problems[0] if problems else found


def load_tensors(path: Path, tensors: Tensors, runtime: Runtime) -> None:
    """Load a checkpoint into these tensors, which the model and the optimizer share."""

    def read() -> None:
        try:
            load(tensors, storage_reader=TensorReader(path))
        except CheckpointException as error:  # on every rank
            raise ValueError(
                f"checkpoint: {path} could not be loaded ({first_failure(error)}), "
                "use another checkpoint"
            ) from error

    runtime.on_every_rank(read)
