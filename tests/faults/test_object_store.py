"""Dataset and checkpoints in an object store, and ranks that die while they write there."""

import json
import os

import pytest

from data.url_dataset import dataset_at
from inference.loading.run import load_run
from inference.text.model import load
from models.checkpoint_format import MANIFEST, checkpoint_steps
from tests.faults.state import fingerprint


def tokens(run):
    """Return what greedy decoding of a run's newest checkpoint writes."""
    return load(run).generate("the tokens of", max_new_tokens=12).tokens


@pytest.mark.slow
def test_a_run_in_a_store_dies_twice_and_ends_as_one_on_a_disk(
    launch, undisturbed, corpus, s3, s3_server
):
    for path in corpus.iterdir():
        (s3 / "data" / path.name).upload(path)
    environment = {**s3_server, "SKIPSTONE_CACHE": os.environ["SKIPSTONE_CACHE"]}
    options = {
        "environment": environment,
        "data__path": s3 / "data",
        "checkpoint__folder": s3 / "runs",
    }
    run = s3 / "runs" / "run"
    for rank, point, left in ((1, "shard", "none"), (0, "manifest", "all")):
        job = launch(
            faults=[("kill_in_checkpoint", {"rank": rank, "step": 6, "point": point})], **options
        )
        assert -9 in job.wait(), job.output
        assert list(checkpoint_steps(run)) == [3]
        torn = (run / "step-00000006").files()
        assert MANIFEST not in torn
        assert ("__1_0.distcp" in torn) == (left == "all")
        assert json.loads((job.run / "status.json").read_text())["saved"] == 3
    again = launch(**options)
    assert again.wait() == [0, 0], again.output
    assert f"resuming from {run / 'step-00000003'}, step 3" in again.output
    assert not (again.run / "checkpoints").exists()
    assert fingerprint(run) == fingerprint(undisturbed)
    assert fingerprint(run)[0] == 8
    # Decoded from a copy, whose bytes are those of the store.
    assert tokens(str(run)) == tokens(str(undisturbed))
    opened = load_run(run)
    assert opened.open_data(None).fingerprint == dataset_at(corpus).fingerprint
