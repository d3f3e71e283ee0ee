import logging

import pytest

import data.progress
from data.progress import Progress


def test_a_log_gets_a_plain_line_now_and_then_and_one_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(data.progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), Progress("reading", 50_000_000) as progress:
        for _ in range(25):
            now += 1.0
            progress.update(2_000_000)
    assert caplog.messages == [
        "reading: 20.0 of 50.0 MB",
        "reading: 40.0 of 50.0 MB",
        "reading: 50.0 MB, done",
    ]


def test_failed_work_is_not_called_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="gone"), Progress("reading"):
        raise OSError("gone")
    assert caplog.messages == []
