"""What all rooms test with: texts, a tokenizer, a tiny corpus, and training jobs on it."""

import itertools
import logging
import os
import re
import uuid

import pytest

from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.tokenizer import train_tokenizer
from data.urls import Url, _s3_options
from tests.browser import open_chromium
from tests.documents import make_documents
from tests.forked_jobs import Launcher
from tests.training import ROOT, Training


def pytest_configure(config):
    """Hide GPUs from this process and its children, unless tests of GPUs are chosen: -m gpu."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def documents():
    """Return 60 texts."""
    return make_documents(60)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """Return the file of a tokenizer of 320 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(make_documents(200), 320, path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return a prepared dataset of 400 ids: this repository's own sources."""
    folder = tmp_path_factory.mktemp("corpus") / "tokens"
    inputs = tuple(str(ROOT / room) for room in ("models", "loss", "train"))
    prepare(PrepareConfig(input=inputs, vocab_size=400, validation_fraction=0.2), folder, workers=1)
    return folder


@pytest.fixture
def training(corpus, tmp_path):
    """Return the command that trains into a fresh output folder, as a user runs it."""
    return Training(corpus, tmp_path / "outputs")


@pytest.fixture(scope="session")
def chromium():
    """Return a browser without a window, for the tests of all pages."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def s3_server():
    """Return the environment of a process that is to reach a server of S3 on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """Return the URL of an empty bucket, which this process and its children reach."""
    import s3fs

    for name, value in {**s3_server, "SKIPSTONE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    _s3_options.cache_clear()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield Url(f"s3://{bucket}")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """Return the URL of an empty folder in this process's memory."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return Url(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def launcher():
    """Return the warm process that training jobs are forked from."""
    warm = Launcher()
    yield warm
    warm.close()


@pytest.fixture
def launch(launcher, training, tmp_path):
    """Return launch(ranks=2, name="run", faults=(), **overrides) -> Job, with tiny settings."""
    numbers = itertools.count()
    jobs = []

    def start(*, ranks=2, name="run", faults=(), environment=None, preset="demo", **overrides):
        job = launcher.start(
            tmp_path / f"job-{next(numbers)}",
            training.output / name,
            training.arguments(preset=preset, name=name, **overrides),
            ranks=ranks,
            faults=faults,
            environment=environment,
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        if not (job.folder / "statuses").exists():
            job.kill()
