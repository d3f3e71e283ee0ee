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


def run_once(launcher, corpus, folder, faults=(), timeout=60, **overrides):  # noqa: F811
    """Start one job of two ranks in `folder`; return it and how its ranks ended."""
    training = Training(corpus, folder)
    arguments = training.arguments(name="run", **overrides)
    job = launcher.start(folder / "job", folder / "run", arguments, faults=faults)
    return job, job.wait(timeout)


@pytest.fixture(scope="session")
def undisturbed(launcher, corpus, tmp_path_factory):  # noqa: F811
    """Return a run left in peace: the state that any disturbed one is to end in."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job, statuses = run_once(launcher, corpus, folder, metrics__interval_steps=1)
    assert statuses == [0, 0], job.output
    return job.run


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
