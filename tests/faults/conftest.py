"""Whole training jobs, forked from a warm process, with faults in them."""

import itertools

import pytest

from tests.faults.launcher import Launcher
from tests.train.conftest import Training, corpus  # noqa: F401  a fixture


@pytest.fixture(scope="session")
def launcher():
    """Return the warm process that training jobs are forked from."""
    warm = Launcher()
    yield warm
    warm.close()


@pytest.fixture
def training(corpus, tmp_path):  # noqa: F811
    """Return the command that trains into a fresh output folder, for torchrun."""
    return Training(corpus, tmp_path / "outputs")


@pytest.fixture
def launch(launcher, training, tmp_path):
    """Return launch(ranks=2, name="run", faults=(), **overrides) -> Job, with tiny settings."""
    numbers = itertools.count()
    jobs = []

    def start(*, ranks=2, name="run", faults=(), environment=None, **overrides):
        job = launcher.start(
            tmp_path / f"job-{next(numbers)}",
            training.output / name,
            training.arguments(name=name, **overrides),
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
