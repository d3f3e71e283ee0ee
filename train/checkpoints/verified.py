"""Find an intact checkpoint and load it: rank 0 lists, all ranks verify a share of the files.

Where there are some and none verifies, training stops instead of silently starting at step 0.
"""

import logging

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from data.urls import Location, MissingUrlError, UrlError
from models.checkpoint_format import (
    Manifest,
    check_content,
    check_listing,
    checkpoint_steps,
)
from models.tensor_reader import TensorReader
from train.checkpoints.content import Tensors
from train.checkpoints.folder import DAMAGED, first_failure
from train.checkpoints.folders import folder_at
from train.parallel.runtime import Runtime

logger = logging.getLogger(__name__)


def newest_intact(
    folder: Location, runtime: Runtime, *, last_step: int | None = None
) -> tuple[Location, Manifest] | None:
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
    listed = runtime.on_every_rank(lambda: checkpoint_steps(folder) if runtime.is_main else {})
    steps = runtime.gather(listed)[0]
    eligible = [step for step in steps if last_step is None or step <= last_step]
    damaged: list[Location] = []

    def put_aside() -> None:
        for bad in damaged if runtime.is_main else ():
            folder_at(folder).set_aside(bad.name, DAMAGED)

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


def verify_together(path: Location, runtime: Runtime) -> Manifest | str:
    """Compare a checkpoint with its manifest, each rank reading a share of the files.

    Returns:
        The manifest as rank 0 reads it, or the first problem, the same on every rank.

    Raises:
        ValueError: On rank 0, if a store cannot be read, which is no damage.
        SystemExit: On the other ranks then.
    """

    def listing() -> Manifest | str:
        try:
            return check_listing(path)
        except MissingUrlError as error:
            return str(error)
        except UrlError:
            raise
        except (ValueError, OSError) as error:
            return str(error)

    def content(manifest: Manifest) -> str:
        share = sorted(manifest.files)[runtime.rank :: runtime.world_size]
        try:
            check_content(path, manifest, share)
        except MissingUrlError as error:
            return str(error)
        except UrlError:
            raise
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    found = runtime.on_every_rank(lambda: listing() if runtime.is_main else "")
    found = runtime.gather(found)[0]
    if isinstance(found, str):
        return found
    manifest = found
    problems = runtime.gather(runtime.on_every_rank(lambda: content(manifest)))
    return next(filter(None, problems), found)


def load_tensors(path: Location, tensors: Tensors, runtime: Runtime) -> None:
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
