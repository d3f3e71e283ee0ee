"""Pretrain a Llama with the LayerSkip recipe: torchrun --nproc_per_node=8 train/main.py [PRESET].

Reads like the algorithm: the plan of step t, one step of minimising J, and what is due after it.
"""

import json
import logging
import sys
from collections.abc import Sequence

from models.flops import total_params
from train.checkpointer import (
    RunIdentity,
    delete_old_checkpoints,
    load_initial_weights,
    resume,
    save_checkpoint,
)
from train.command_line import parse
from train.config import TrainConfig
from train.corpus import open_corpus, train_loader, validation_stream
from train.layerskip import LayerSkipSchedule
from train.metrics import open_metrics
from train.optim import build_optimizer
from train.parallelize import build_model
from train.report import StepReport, exit_metrics, step_line, validation_line
from train.runtime import (
    Runtime,
    is_main_process,
    launched_ranks,
    start_logging,
    start_runtime,
)
from train.step import train_step
from train.titan import GarbageCollection
from train.validate import validate

logger = logging.getLogger(__name__)


def train(config: TrainConfig, runtime: Runtime) -> None:
    """Train from the newest checkpoint of the run, or from step 0, to the last step."""
    dataset = runtime.main_first(lambda: open_corpus(config.data, config.model.vocab_size))
    loader = runtime.on_every_rank(lambda: train_loader(dataset, config.data, runtime, config.seed))
    held_out = runtime.on_every_rank(lambda: validation_stream(dataset, config.data))
    layerskip = LayerSkipSchedule(
        layer_dropout=config.layer_dropout,
        curriculum=config.curriculum,
        early_exit=config.early_exit,
        L=config.model.n_layers,
        T=config.steps,
    )
    model = build_model(config.model, config.parallel, runtime, config.seed)
    optimizer = build_optimizer(model, config.optim)
    identity = RunIdentity(
        model=config.model,
        config=config.as_dict(),
        tokenizer_path=dataset.tokenizer_path,
        tokenizer_fingerprint=dataset.tokenizer_fingerprint,
        data_fingerprint=dataset.fingerprint,
    )
    checkpoints = config.run_dir / "checkpoints"
    start = resume(checkpoints, model, optimizer, identity=identity, runtime=runtime)
    if start == 0 and config.checkpoint.init_from:
        load_initial_weights(config.checkpoint.init_from, model, runtime=runtime)
    if start >= config.steps:
        logger.info("%s has done all its %d steps", config.run_dir, start)
        return
    announce(config, runtime)
    metrics = open_metrics(
        config.metrics, config.run_dir, identity.config, done_steps=start, runtime=runtime
    )
    report = StepReport(config, runtime)
    collector = GarbageCollection(gc_freq=100)
    pin_memory = runtime.device.type == "cuda"

    for t, microbatches in loader.batches(start, config.steps, pin_memory=pin_memory):
        plan = layerskip.at(t)  # p(l, t) = S(t) D(l) p_max and e_tilde(t, l) from C(t, l) e(l)
        result = train_step(
            model, optimizer, microbatches, plan, t, config=config, runtime=runtime
        )  # minimises J(X, Y, t)
        report.add(result, plan)
        done = t + 1
        if due(config.metrics.interval_steps, done, config.steps):
            values = report.read(done)
            metrics.log(values, done)
            logger.info("%s", step_line(values, done, config))
        with report.throughput.paused():
            if due(config.validate.interval_steps, done, config.steps):
                losses = validate(
                    model,
                    held_out,
                    config.validate,
                    runtime,
                    seq_len=config.data.seq_len,
                    rows=config.data.rows_at_once(runtime.world_size),
                    chunk_rows=config.early_exit.chunk_rows,
                )
                metrics.log(exit_metrics("validation", dict(enumerate(losses)), len(losses)), done)
                logger.info("%s", validation_line(losses, done))
            if due(config.checkpoint.interval_steps, done, config.steps):
                save_checkpoint(
                    checkpoints, done, model, optimizer, identity=identity, runtime=runtime
                )
                if runtime.is_main:
                    delete_old_checkpoints(checkpoints, config.checkpoint.keep_latest)
        collector.run(done)
    metrics.close()


def due(interval_steps: int, done_steps: int, steps: int) -> bool:
    """Whether something that happens every `interval_steps`, and at the end, happens now."""
    return done_steps == steps or bool(interval_steps and done_steps % interval_steps == 0)


def announce(config: TrainConfig, runtime: Runtime) -> None:
    """Write `config.json` into the run folder, and say what is about to run."""
    if not runtime.is_main:
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.json").write_text(json.dumps(config.as_dict(), indent=1) + "\n")
    logger.info(
        "%s: %.1fM parameters on %d x %s, %d steps of %s tokens",
        config.run_dir,
        total_params(config.model) / 1e6,
        runtime.world_size,
        runtime.device_name(),
        config.steps,
        f"{config.data.tokens_per_step:,}",
    )


def main(arguments: Sequence[str]) -> int:
    """Parse, train, and turn a user's error into one line."""
    start_logging()
    speaks = is_main_process()
    try:
        config = parse(arguments, show=speaks)
        config.check(launched_ranks())
    except ValueError as error:
        return fail(error) if speaks else 2
    try:
        with start_runtime(config.runtime, config.seed) as runtime:
            train(config, runtime)
    except FloatingPointError as error:  # agreed on by all ranks
        return fail(error) if speaks else 2
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


def fail(error: Exception) -> int:
    """Print a user's error, one line per problem, and return the exit status."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
