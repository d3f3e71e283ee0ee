"""What a run is going to read is logged for each source."""

import logging
import re

import torch

from train.loop.corpus import open_corpus, train_loader
from train.loop.data_config import DataConfig
from train.parallel.runtime import Runtime


def test_tokens_and_epochs_of_each_source_are_logged(corpus, caplog):
    config = DataConfig(
        path=str(corpus), also=(str(corpus),), weights=(3.0, 1.0), seq_len=16, global_batch_size=8
    )
    runtime = Runtime(rank=0, world_size=1, device=torch.device("cpu"), job="")
    opened = open_corpus(config, 400)
    with caplog.at_level(logging.INFO, "train.loop.corpus"):
        reading = opened.unread(config)
        loader = train_loader(
            opened, config, runtime, seed=0, reading=reading, rows=1024 * config.global_batch_size
        )
    windows = len(loader.mixture.sources[0])
    # 8192 rows of 16 tokens, three quarters and one of them.
    for text, rows, percent in zip(caplog.messages, (6144, 2048), ("75.0", "25.0"), strict=True):
        found = re.match(
            r"data: ([0-9,]+) tokens of .*, ([0-9.]+) % of all: ([0-9.]+) epochs", text
        )
        assert found is not None
        assert found.groups() == (f"{rows * 16:,}", percent, f"{rows / windows:.2f}")
