"""Where attention stays within documents, training and validation number the documents."""

import dataclasses

import numpy as np
import pytest
import torch

from data.boundaries import Boundaries
from data.loader import microbatch
from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.shards import NO_LOSS
from loss.softmax import IGNORE_INDEX
from models.layer_dropout import LayerDropoutConfig
from tests.batches import batch_at
from tests.distributed import run_distributed
from tests.train.loop.test_step import STEP, make_config, plan_of
from train.job import open_job
from train.loop.corpus import open_corpus, train_loader
from train.loop.data_config import DataConfig
from train.loop.step import accumulate_gradients
from train.loop.validate import ValidateConfig, validate
from train.monitoring.interruption import Interruption
from train.parallel.parallelize import build_model
from train.parallel.runtime import Runtime

BOS, SEQ = 1, 12
LENGTHS = ((5, 4, 3), (2, 10), (12,), (1, 6, 5))
"""Of the documents of each packed row."""


def test_data_and_loss_mean_the_same_by_a_label_without_a_loss():
    assert NO_LOSS == IGNORE_INDEX, "two rooms that may not import each other"


def packed_and_alone():
    """Return the microbatch of LENGTHS, and that of the same documents with a row each."""
    packed = np.random.default_rng(4).integers(2, 53, (len(LENGTHS), SEQ))
    labels = np.random.default_rng(5).integers(2, 53, packed.shape)
    tokens_alone, labels_alone = [], []
    for row, lengths in enumerate(LENGTHS):
        for begin, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
            packed[row, begin] = BOS
            tokens_alone.append(np.full(SEQ, BOS))
            labels_alone.append(np.full(SEQ, NO_LOSS))
            tokens_alone[-1][:length] = packed[row, begin : begin + length]
            labels_alone[-1][:length] = labels[row, begin : begin + length]
    alone = np.stack(tokens_alone), np.stack(labels_alone), np.arange(len(tokens_alone))
    return (
        microbatch(packed, labels, np.arange(len(LENGTHS)), Boundaries(BOS)),
        microbatch(*alone, boundaries=None),
    )


def check_step(runtime):
    config = make_config(layer_dropout=LayerDropoutConfig())
    found = []
    for batch in packed_and_alone():
        model = build_model(config.model, config.parallel, runtime, config.seed)
        totals = accumulate_gradients(
            model, [batch], plan_of(config), STEP, config=config.step_config, runtime=runtime
        )
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        found.append({"J": totals.J, "sums": totals.exit_sums} | grads)
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-4)


def test_a_step_on_packed_documents_is_one_on_each_in_a_row_of_its_own():
    run_distributed(check_step, 1)


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Return a dataset of many documents of a line each."""
    folder = tmp_path_factory.mktemp("short")
    for n in range(80):
        (folder / f"{n}.txt").write_text(f"the square of {n} is {n * n}")
    prepare(
        PrepareConfig(input=(str(folder),), vocab_size=300, validation_fraction=0.3),
        folder / "tokens",
        workers=1,
    )
    return folder / "tokens"


def data_config(path, *, mask):
    return DataConfig(path=str(path), seq_len=64, global_batch_size=4, mask_documents=mask)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_training_rows_number_their_documents_where_configured(short_documents, packing):
    runtime = Runtime(rank=0, world_size=1, device=torch.device("cpu"), job="")
    for mask in (True, False):
        config = dataclasses.replace(data_config(short_documents, mask=mask), packing=packing)
        corpus = open_corpus(config, 300)
        [batch] = batch_at(
            train_loader(corpus, config, runtime, 0, reading=corpus.unread(config), rows=1), 0
        )
        if not mask:
            assert batch.documents is None
            continue
        begins = batch.tokens == corpus.boundaries(corpus.datasets[0]).bos_id
        assert begins[:, 1:].any(), "rows were to hold several documents"
        new = batch.documents.diff(dim=1)
        assert torch.equal(new, begins[:, 1:].long())


def check_job(runtime, root, path):
    """Open the job with and without the mask: the same weights, other losses."""
    losses = {}
    for mask in (True, False):
        base = make_config(steps=1, name=f"mask-{mask}", output_dir=str(root))
        model = dataclasses.replace(base.model, vocab_size=300, max_seq_len=64)
        data = data_config(path, mask=mask)
        config = dataclasses.replace(base, model=model, data=data)
        with Interruption() as interruption, open_job(config, runtime, interruption) as job:
            corpus = open_corpus(data, 300)
            own = corpus.boundaries(corpus.datasets[0])
            assert job.held_out.boundaries == (own if mask else None)
            assert (next(job.batches(0, job.state))[1][0].documents is not None) == mask
            losses[mask] = validate(
                job.model, job.held_out, ValidateConfig(), runtime,
                rows=2, chunk_rows=64, token_depth=config.token_depth,
            )  # fmt: skip
    assert losses[True] != losses[False]


def test_a_job_trains_and_validates_within_documents_where_configured(tmp_path, short_documents):
    run_distributed(check_job, 1, tmp_path, short_documents)
