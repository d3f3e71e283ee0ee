"""Time of a training step with stochastic depth, beside the arithmetic that it saves.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/layer_dropout.py \
        --json benchmarks/layer_dropout.json

A step is forward, the loss of the last exit, backward and AdamW, of random tokens. Two ways to drop
the same rows: gather, as in training, runs a layer on its kept rows alone; mask runs it on all and
selects, which keeps one shape and saves nothing. `ratio` is the median over rounds of an arm's time
over that of the same steps without dropout in the same round, where arms take turns step by step;
`arithmetic` is the share of the FLOPs that remains. `one row` drops one row of every layer: the
least that can pay. Times are of one thread's CPU, to which other work beside it adds little.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.command_line import run_command
from inference.cli.arguments import Count, OutputFile
from inference.loading.machine import machine
from models.flops import train_flops_per_token
from models.layer_dropout import KeptRows, LayerChoice, LayerDropoutConfig, draw_kept_rows, p
from models.layer_masks import LayerMasks
from models.llama import Llama
from models.sizes import SIZES


class Case(NamedTuple):
    """A model, the tokens of a row, rows of a batch, and rows of a measurement: whole batches."""

    size: str
    seq_len: int
    batches: tuple[int, ...]
    rows: int


CASES = {
    "full": Case("demo", 256, (2, 8, 32), 32),
    "tiny": Case("tiny", 16, (2, 4), 4),
}
Found = dict[str, Any]
Way = Callable[[Llama, Tensor, KeptRows | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure stochastic depth."""

    size: Literal["full", "tiny"] = "full"
    """tiny: a rehearsal of seconds."""
    p_max: tuple[float, ...] = (0.1, 0.2, 0.5)
    """Drop probabilities of the last layer; exponential over depth, constant over steps."""
    repeats: Count = 7
    """Rounds in which every arm has a turn."""
    json: OutputFile | None = None
    """Also write the numbers to this file."""


class Trainer:
    """A model and its optimizer, stepped on random tokens."""

    def __init__(self, case: Case) -> None:
        self.model, self.seq_len = Llama(SIZES[case.size]), case.seq_len
        self.model.init_weights(0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        vocab_size, draw = self.model.config.vocab_size, torch.Generator().manual_seed(0)
        shape = (max(case.batches), case.seq_len + 1)
        self.rows = torch.randint(vocab_size, shape, generator=draw)

    def step(self, way: Way, batch: int, kept: KeptRows | None) -> None:
        """Take one step on `batch` rows."""
        rows = self.rows[:batch]
        hidden = self.model.before_head(way(self.model, self.model.embed(rows[:, :-1]), kept))
        logits = self.model.head(hidden).flatten(0, 1)
        F.cross_entropy(logits, rows[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def arithmetic(self, layer_rows: float) -> float:
        """Return the share of a step's FLOPs that remains with a share of the layers' rows."""
        n_layers = self.model.config.n_layers
        with_all, with_kept = (
            train_flops_per_token(
                self.model.config, self.seq_len, mean_layers=share * n_layers, mean_exits=1
            )
            for share in (1.0, layer_rows)
        )
        return with_kept / with_all


def gather(model: Llama, h: Tensor, kept: KeptRows | None) -> Tensor:
    """Run the layers as in training."""
    masks = LayerMasks(kept_rows=kept)
    return model.run_layers(h, 0, model.config.n_layers, masks=masks)[0]


def mask(model: Llama, h: Tensor, kept: KeptRows | None) -> Tensor:
    """Run every layer on every row, and select."""
    for l in range(model.config.n_layers):
        out, _ = model.run_layers(h, l, l + 1)
        rows = None if kept is None else kept.at(l).rows
        if rows is not None:
            keep = torch.zeros(len(h), 1, 1, dtype=torch.bool).index_fill_(0, rows, value=True)
            out = torch.where(keep, out, h)
        h = out
    return h


ARMS: dict[str, tuple[Way, bool]] = {
    "whole": (gather, False),
    "gather": (gather, True),
    "mask": (mask, True),
}
"""{arm: how the layers run, and whether rows are dropped}."""


def draws(p_max: float, batch: int, steps: int, n_layers: int) -> list[KeptRows | None]:
    """Return which rows of a batch each layer keeps, step by step."""
    config = LayerDropoutConfig(p_max=p_max, S="constant")
    return [
        draw_kept_rows(
            [p(l, t, L=n_layers, T=steps, config=config) for l in range(n_layers)],
            seed=0,
            t=t,
            keys=np.arange(batch),
            scale_kept=False,
            device=torch.device("cpu"),
        )
        for t in range(steps)
    ]


def all_but_one(batch: int, n_layers: int) -> KeptRows:
    """Drop one row of every layer, another of each."""
    rows = torch.arange(batch)
    return KeptRows(tuple(LayerChoice(rows[rows != l % batch], 1.0) for l in range(n_layers)))


def kept_share(steps: Sequence[KeptRows | None], batch: int, n_layers: int) -> float:
    """Return the share of the layers' rows that run."""
    choices = [choice for kept in steps if kept is not None for choice in kept.choices]
    dropped = sum(batch - len(each.rows) for each in choices if each.rows is not None)
    return 1 - dropped / (len(steps) * n_layers * batch)


def compare(options: Options) -> None:
    """Measure, print a table, and write the numbers down."""
    case = CASES[options.size]
    trainer, found = Trainer(case), []
    print("| batch | dropped | layer rows | arithmetic | gather | mask |")
    print("|---:|---|---:|---:|---:|---:|")
    for batch in case.batches:
        for each in measure(trainer, case, batch, options):
            found.append(each)
            print(
                f"| {batch} | {each['dropped']} | {each['layer_rows']:.3f} | "
                f"{each['arithmetic']:.3f} | {each['ratio']['gather']:.3f} | "
                f"{each['ratio']['mask']:.3f} |",
                flush=True,
            )
    if options.json is not None:
        content = {"machine": machine(), "load_average": os.getloadavg()[0]}
        content |= case._asdict() | {"repeats": options.repeats, "cases": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def measure(trainer: Trainer, case: Case, batch: int, options: Options) -> Iterator[Found]:
    """Yield, for each way to draw the rows, what is saved and how long the arms take."""
    n_layers, steps = trainer.model.config.n_layers, case.rows // batch
    kept = {f"p_max {each}": draws(each, batch, steps, n_layers) for each in options.p_max}
    kept["one row"] = [all_but_one(batch, n_layers)] * steps
    for way, each in ARMS.values():  # makes kernels and threads
        trainer.step(way, batch, kept["one row"][0] if each else None)
    for name, drawn in kept.items():
        share = kept_share(drawn, batch, n_layers)
        rounds = [one_round(trainer, batch, drawn, repeat) for repeat in range(options.repeats)]
        yield {
            "batch": batch,
            "dropped": name,
            "layer_rows": share,
            "arithmetic": trainer.arithmetic(share),
            "seconds": {arm: statistics.median(each[arm] for each in rounds) for arm in ARMS},
            "ratio": {
                arm: statistics.median(each[arm] / each["whole"] for each in rounds) for arm in ARMS
            },
        }


def one_round(
    trainer: Trainer, batch: int, drawn: Sequence[KeptRows | None], repeat: int
) -> dict[str, float]:
    """Return the mean seconds of a step of every arm, which take turns step by step."""
    seconds = dict.fromkeys(ARMS, 0.0)
    for i, kept in enumerate(drawn):
        for arm in ARMS if (repeat + i) % 2 == 0 else reversed(ARMS):
            way, drops = ARMS[arm]
            begin = time.process_time()
            trainer.step(way, batch, kept if drops else None)
            seconds[arm] += (time.process_time() - begin) / len(drawn)
    return seconds


if __name__ == "__main__":
    run_command(Options, compare, prog="benchmarks/layer_dropout.py")
