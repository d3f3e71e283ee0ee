"""What all rooms test with: texts, a tokenizer, a tiny corpus, and training jobs on it."""

import itertools

import pytest

from data.preparation import prepare
from data.prepare_config import PrepareConfig
from data.tokenizer import train_tokenizer
from tests.documents import make_documents
from tests.forked_jobs import Launcher
from tests.training import ROOT, Training


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
