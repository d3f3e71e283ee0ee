"""Whole training jobs with faults in them, and what they are compared with."""

import pytest

from tests.training import Training


def run_once(launcher, corpus, folder, faults=(), timeout=60, environment=None, **overrides):
    """Start one job of two ranks in `folder`; return it and how its ranks ended."""
    training = Training(corpus, folder)
    arguments = training.arguments(name="run", **overrides)
    job = launcher.start(
        folder / "job", folder / "run", arguments, faults=faults, environment=environment
    )
    return job, job.wait(timeout)


@pytest.fixture(scope="session")
def undisturbed(launcher, corpus, tmp_path_factory):
    """Return a run left in peace: the state that any disturbed one is to end in."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job, statuses = run_once(launcher, corpus, folder, metrics__interval_steps=1)
    assert statuses == [0, 0], job.output
    return job.run
