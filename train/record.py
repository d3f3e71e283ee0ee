"""The record of a run in its folder: how it began, and where it hung."""

import json
import logging
from pathlib import Path

from models.flops import total_params
from train.config.config import TrainConfig
from train.parallel.runtime import Runtime
from train.run_folder.events import EventLog, append_event
from train.run_folder.writing import attempt, replace_file

logger = logging.getLogger(__name__)

SHARDED = {
    "none": "none, every rank holds the whole model",
    "blocks": "blocks, each a unit of FSDP2",
}


def record_start(config: TrainConfig, runtime: Runtime, events: EventLog, start: int) -> None:
    """Record the start of the run, write its `config.json` and log its size."""
    events.append("start", start, world_size=runtime.world_size)
    if not runtime.is_main:
        return
    path, text = config.run_dir / "config.json", json.dumps(config.as_dict(), indent=1) + "\n"
    attempt(path, lambda: replace_file(path, text.encode()))
    logger.info(
        "%s: %.1fM parameters on %d x %s, %d steps of %s tokens",
        config.run_dir,
        total_params(config.model) / 1e6,
        runtime.world_size,
        runtime.device_name(),
        config.steps,
        f"{config.data.tokens_per_step:,}",
    )
    on_gpu = runtime.device.type == "cuda"
    parallel = config.parallel.settled(config.model, runtime.world_size, on_gpu=on_gpu)
    if config.parallel.shard == "auto":
        logger.info("parallel.shard: %s", SHARDED[parallel.shard])
    if parallel.compile:
        logger.info("parallel.compile: on, the first steps take a minute longer")
    elif config.parallel.compile is None:
        logger.info("parallel.compile: off, on %s", runtime.device.type)


def record_hang(path: Path, reason: str, t: int) -> None:
    """Append a hang to the events; not by EventLog, as the rank may be another than rank 0."""
    append_event(path, "hang", t, reason=reason)
