"""No metric, chart, status or line of the console can end a run or change its weights."""

from tests.faults.conftest import run_once
from tests.faults.state import fingerprint


def test_a_run_with_every_sink_broken_ends_in_the_state_of_an_undisturbed_one(
    launcher, corpus, tmp_path, undisturbed, monkeypatch
):
    run = tmp_path / "run"
    for folder in ("events.jsonl", "status.json", "config.json"):
        (run / folder).mkdir(parents=True)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    job, statuses = run_once(
        launcher,
        corpus,
        tmp_path,
        faults=[("break_sinks", {"run": str(run), "t": 3})],
        environment={"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)},
        metrics__interval_steps=1,
        metrics__wandb=True,
    )
    assert statuses == [0, 0], job.output
    assert fingerprint(run) == fingerprint(undisturbed)
    [charts] = run.glob("events.out.tfevents.*")
    for target, reason in {
        "events.jsonl": "Is a directory",
        "status.json": "Is a directory",
        "config.json": "Is a directory",
        "metrics.jsonl": "No space left on device",
        charts.name: "Is a directory",
        "wandb": "W&B has gone",
    }.items():
        assert job.output.count(f"{target}: not written, {reason}") == 1, job.output
    assert job.output.count("wandb: offline, ") == 1
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert "Traceback" not in job.output
