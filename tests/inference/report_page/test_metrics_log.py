"""The losses of a run's log: whatever a line holds, the others are read."""

import json
import math

import numpy as np
import pytest

from inference.report_page.metrics_log import LOG, Series, binned, read_losses


def log_of(folder, lines):
    (folder / LOG).write_bytes(b"\n".join(lines))
    return read_losses(folder)


def line(step, **losses):
    return json.dumps({"step": step, **{name.replace("__", "/"): v for name, v in losses.items()}})


def test_a_run_without_a_log_has_none(tmp_path):
    assert read_losses(tmp_path) is None


def test_losses_are_read_by_split_and_exit_from_the_run_and_from_its_checkpoint(tmp_path):
    lines = [
        line(5, train__loss_exit_01=3.0, train__loss_exit_12=2.0, train__loss=9.0),
        line(10, train__loss_exit_01=2.5, validation__loss_exit_01=2.75),
    ]
    log = log_of(tmp_path, [text.encode() for text in lines])
    assert {E: s.losses.tolist() for E, s in log.train.items()} == {1: [3.0, 2.5], 12: [2.0]}
    assert log.validation[1].steps.tolist() == [10]
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    assert read_losses(checkpoint).train.keys() == {1, 12}


def test_damaged_lines_are_counted_and_the_others_read(tmp_path):
    damaged = [
        *[b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"step": true}', b'{"train/loss_exit_01": 1.0}'],
        *[b"[" * 100_000, b'{"step": 1e999}', b'{"step": -4}', b'{"step": 1, "step": 2}'],
        b'{"step": 20, "train/loss_exit_01": 1.',
    ]
    good = line(7, train__loss_exit_01=4.0).encode()
    log = log_of(tmp_path, [*damaged[:5], good, *damaged[5:]])
    assert log.unread == len(damaged)
    assert log.train[1].losses.tolist() == [4.0]


@pytest.mark.parametrize("value", ['"3"', "null", "{}", "[1]", "true", "1" + "0" * 400])
def test_a_loss_that_is_no_number_is_none(value, tmp_path):
    log = log_of(tmp_path, [f'{{"step": 1, "train/loss_exit_02": {value}}}'.encode()])
    assert log.not_finite == 1
    assert not log.unread


def test_nan_losses_leave_gaps_and_are_counted(tmp_path):
    lines = [line(1, train__loss_exit_01=math.nan), line(2, train__loss_exit_01=2.0)]
    log = log_of(tmp_path, [text.encode() for text in lines])
    assert log.not_finite == 1
    assert np.isnan(log.train[1].losses[0])


def test_exits_beyond_any_model_and_other_names_are_left_out(tmp_path):
    names = (
        "train/loss_exit_00",
        "train/loss_exit_9999",
        "test/loss_exit_01",
        "xtrain/loss_exit_1",
    )
    log = log_of(tmp_path, [json.dumps({"step": 1, **dict.fromkeys(names, 1.0)}).encode()])
    assert not log.train


def test_of_a_step_logged_again_after_a_resume_the_last_counts(tmp_path):
    steps = [(10, 5.0), (20, 4.0), (30, 3.0), (20, 4.5), (30, 3.5)]
    log = log_of(tmp_path, [line(s, train__loss_exit_01=v).encode() for s, v in steps])
    assert log.train[1].steps.tolist() == [10, 20, 30]
    assert log.train[1].losses.tolist() == [5.0, 4.5, 3.5]


def test_a_long_log_is_thinned_to_means(tmp_path):
    lines = (f'{{"step": {i}, "train/loss_exit_01": {i % 2}}}'.encode() for i in range(20_000))
    thin = log_of(tmp_path, [*lines]).train[1].thinned(200)
    assert len(thin.steps) == 200
    assert np.allclose(thin.losses, 0.5, atol=0.01)


def test_bins_are_means_of_finite_losses():
    series = Series(np.arange(4.0), np.array([1.0, np.nan, 3.0, 5.0]))
    found = binned(series, np.array([-0.5, 0.5, 1.5, 3.5]))
    assert found[0] == 1.0
    assert np.isnan(found[1])
    assert found[2] == 4.0
