"""What can go wrong in a rank: each function is called in it before training and breaks one thing.

Product code is unaware of these: they replace functions in the process that is to fail.
`on_rank` is the rank a function is called on, `rank` the one it is to hit.
"""

import builtins
import os
import resource
import signal
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint.filesystem as torch_files

import data.stages
import train.checkpoints.checkpointer
import train.checkpoints.local_folder
import train.job
import train.loop.corpus
import train.loop.step
import train.main
from data.loader import Microbatch, TokenLoader
from models.checkpoint_format import Manifest
from train.checkpoints.checkpointer import CheckpointWriter
from train.run_folder.weights_and_biases import WeightsAndBiases


def _before_step(t_hit, action):
    take = train.main.train_step

    def step(model, optimizer, microbatches, plan, t, **rest):
        if t == t_hit:
            action(model)
        return take(model, optimizer, microbatches, plan, t, **rest)

    train.main.train_step = step


def _before_call(owner, name, action):
    function = getattr(owner, name)

    def with_action(*arguments, **keywords):
        action()
        return function(*arguments, **keywords)

    setattr(owner, name, with_action)


def kill(on_rank, rank, t, number=signal.SIGKILL, times=1):
    """Send rank `rank` a signal as it begins step t."""
    if on_rank == rank:
        _before_step(t, lambda model: [os.kill(os.getpid(), number) for _ in range(times)])


def kill_once(on_rank, rank, t, marker):
    """Kill rank `rank` as it begins step t, unless the file `marker` is there: it has been done."""
    if on_rank == rank and not os.path.exists(marker):

        def die(model):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

        _before_step(t, die)


def fail(on_rank, rank, t, kind, text):
    """Raise a built-in exception on rank `rank` as it begins step t."""
    if on_rank == rank:

        def broken(model):
            raise getattr(builtins, kind)(text)

        _before_step(t, broken)


def hang(on_rank, rank, t):
    """Let rank `rank` sleep for good as it begins step t."""
    if on_rank == rank:
        _before_step(t, lambda model: time.sleep(1000))


def signal_before_training(on_rank, rank, number):
    """Send rank `rank` a signal while it is setting up."""
    if on_rank == rank:
        _before_call(train.job, "build_model", lambda: os.kill(os.getpid(), number))


def signal_in_save(on_rank, rank, number):
    """Send rank `rank` a signal in the middle of every save."""
    if on_rank == rank:
        _before_call(CheckpointWriter, "save", lambda: os.kill(os.getpid(), number))


def signal_in_validation(on_rank, rank, number):
    """Send rank `rank` a signal in the middle of every validation."""
    if on_rank == rank:
        _before_call(train.main, "validate", lambda: os.kill(os.getpid(), number))


def nan_in_exit(on_rank, rank, steps, l):
    """Make the loss of the exit after layer l not a number on one rank, in some steps."""
    if on_rank != rank:
        return
    now = []
    for t in steps:
        _before_step(t, lambda model: now.append(True))
    loss = train.loop.step.early_exit_loss

    def broken(hidden, *arguments, **keywords):
        if now:
            now.clear()
            hidden = hidden | {l: hidden[l] * float("nan")}
        return loss(hidden, *arguments, **keywords)

    train.loop.step.early_exit_loss = broken


def infinite_gradient(on_rank, rank, t):
    """Give one rank an infinite gradient in step t, behind losses that are finite."""
    if on_rank != rank:
        return
    now = []
    _before_step(t, lambda model: now.append(True))
    clip = train.loop.step.clip_grad_norm_

    def broken(parameters, *arguments):
        parameters = list(parameters)
        if now:
            now.clear()
            parameters[0].grad.to_local().flatten()[0] = float("inf")
        return clip(parameters, *arguments)

    train.loop.step.clip_grad_norm_ = broken


def poison(on_rank, first, stop, label):
    """Fill some batches with one token that is followed by one other, `label`."""
    batch = TokenLoader.batch

    def poisoned(self, rows):
        read = batch(self, rows)
        if not first <= rows[0] // self.global_batch_size < stop:
            return read
        return [
            Microbatch(torch.zeros_like(m.tokens), torch.full_like(m.labels, label), m.samples)
            for m in read
        ]

    TokenLoader.batch = poisoned


def slow_loader(on_rank, rank, seconds):
    """Let rank `rank` wait for every batch."""
    if on_rank != rank:
        return
    batch = TokenLoader.batch

    def slow(self, rows):
        time.sleep(seconds)
        return batch(self, rows)

    TokenLoader.batch = slow


def flip_bit(on_rank, rank, t):
    """Flip one bit of one number of rank `rank`'s weights before step t.

    Not the lowest: the update of the step may round that difference away.
    """
    if on_rank != rank:
        return

    def flip(model):
        weight = model.layers["1"].feed_forward.w1.weight
        with torch.no_grad():
            weight.to_local().view(torch.int32).flatten()[3] ^= 1 << 10

    _before_step(t, flip)


def kill_in_checkpoint(on_rank, rank, step, point):
    """Kill rank `rank` while the checkpoint of `step` steps is written, at one of three points.

    shard: in the middle of a file. manifest: all files are there, but not the list of them.
    rename: all is there, but not under its name. The last two are of rank 0.
    """
    if on_rank != rank:
        return
    name = f"step-{step:08d}"

    def die_if(due):
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    if point == "shard":
        write, items = torch_files._write_item, []

        def write_item(transforms, stream, *rest):
            if name in stream.name:
                items.append(stream)
                stream.flush()
                die_if(len(items) == 5)
            return write(transforms, stream, *rest)

        torch_files._write_item = write_item
    elif point == "manifest":
        content = Manifest.content
        Manifest.content = lambda self: die_if(self.step == step) or content(self)
    else:
        publish = train.checkpoints.local_folder.publish
        train.checkpoints.local_folder.publish = lambda aside, path: (
            die_if(path.name == name) or publish(aside, path)
        )


def full_disk(on_rank, rank, steps):
    """Let rank `rank` write no file of more than 10 kB in the checkpoints of some steps."""
    if on_rank != rank:
        return
    save = train.checkpoints.checkpointer.save
    names = {f"step-{step:08d}.tmp" for step in steps}

    def limited(tensors, *, storage_writer, **rest):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if storage_writer.path.name in names:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            return save(tensors, storage_writer=storage_writer, **rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    train.checkpoints.checkpointer.save = limited


def break_sinks(on_rank, run, t):
    """Put a folder in place of TensorBoard's file before step t, and let W&B refuse from then on.

    Two steps later the console is a pipe that nobody reads.
    """
    if on_rank != 0:
        return

    def refuse(*arguments):
        raise ConnectionResetError("W&B has gone")

    def break_charts(model):
        [file] = Path(run).glob("events.out.tfevents.*")
        file.unlink()
        file.mkdir()
        WeightsAndBiases.log = refuse

    def break_console(model):
        reads, writes = os.pipe()
        os.close(reads)
        os.dup2(writes, 1)
        os.dup2(writes, 2)

    _before_step(t, break_charts)
    _before_step(t + 2, break_console)


def prepare_in(on_rank, folder):
    """Prepare what a run itself makes in this folder."""
    train.loop.corpus.PREPARED = Path(folder)


def signal_while_preparing(on_rank, rank, number):
    """Send rank `rank` a signal while rank 0 encodes the corpus."""
    if on_rank == rank:
        _before_call(data.stages.Preparation, "encode", lambda: os.kill(os.getpid(), number))
