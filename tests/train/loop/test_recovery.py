"""A loss history is a pure function of its steps: what is a spike, and where to roll back to."""

import json
import math
import random
from dataclasses import asdict

import pytest
import torch

from data.batch_ramp import BatchRamp
from data.reading import Reading, SourceRead
from data.window_order import Stretch
from train.loop.recovery import (
    LossHistory,
    RecoveryConfig,
    robust_score,
    rollback_step,
    skip_after_rollback,
)
from train.loop.run_state import RunState, run_state_from_dict
from train.loop.step_metrics import StepMetrics, StepTotals

L = 4
CONFIG = RecoveryConfig(on_spike="rollback")


def metrics(t, loss=3.0, grad_norm=1.0, J=None, exits=None):
    exits = {L - 1: loss} if exits is None else exits
    return StepMetrics(
        t=t,
        J=loss if J is None else J,
        exit_losses=exits,
        density=0.0,
        grad_norm=grad_norm,
        stop=False,
        local=StepTotals.zeros(L, torch.device("cpu")),
    )


def healthy(steps, seed=0):
    """A falling loss with noise, and a gradient norm that varies by a third."""
    draw = random.Random(seed)
    return [
        metrics(t, 3 + 7 * math.exp(-t / 60) + draw.gauss(0, 0.05), math.exp(draw.gauss(0, 0.3)))
        for t in range(steps)
    ]


def anomalies(steps, config=CONFIG):
    """Return every anomaly with the step that completes it."""
    history, found = LossHistory(), []
    for step in steps:
        before, history = history, history.after(step, L - 1, config)
        if anomaly := history.anomaly(before, config):
            found.append((step.t, anomaly))
    return found


def test_score_is_a_z_score_on_normal_numbers():
    draw = random.Random(0)
    history = [draw.gauss(5, 0.5) for _ in range(20001)]
    assert robust_score(6.0, history) == pytest.approx(2.0, abs=0.05)
    assert robust_score(4.5, history) == pytest.approx(-1.0, abs=0.05)


def test_score_of_a_flat_history_counts_in_two_percents_of_the_median():
    assert robust_score(3.3, [3.0] * 50) == pytest.approx(5.0)


def test_a_healthy_run_is_silent():
    for seed in range(5):
        assert anomalies(healthy(2000, seed)) == []


def test_a_spike_of_loss_and_gradient_norm_is_reported_once():
    steps = healthy(400)
    for t in range(300, 306):
        steps[t] = metrics(t, 7.0, 60.0)
    [(t, anomaly)] = anomalies(steps)
    assert t == 302
    assert anomaly.rollback
    assert "loss spike: 7.000, gradient norm 60" in anomaly.reason


def test_a_spike_only_warns_or_is_ignored_where_that_is_set():
    steps = [*healthy(300), *(metrics(t, 7.0, 60.0) for t in range(300, 303))]
    [(_, anomaly)] = anomalies(steps, RecoveryConfig(on_spike="warn"))
    assert not anomaly.rollback
    assert anomalies(steps, RecoveryConfig(on_spike="ignore")) == []


def test_one_bad_batch_is_no_spike():
    steps = healthy(400)
    steps[300] = metrics(300, 9.0, 90.0)
    assert anomalies(steps) == []


def test_a_curriculum_edge_is_no_spike():
    """J and the gradient norm jump when exits are switched on; the last layer's loss does not."""
    steps = healthy(300)
    for t in range(300, 500):
        steps.append(metrics(t, 3.05, 5.0, J=9.0, exits={0: 9.0, L - 1: 3.05}))
    assert anomalies(steps) == []


def test_a_harder_stretch_of_text_without_larger_gradients_is_no_spike():
    steps = [*healthy(300), *(metrics(t, 4.5, 1.0) for t in range(300, 320))]
    assert anomalies(steps) == []


def test_steps_without_the_last_exit_are_passed_over():
    steps = healthy(400)
    for t in range(300, 306):
        steps[t] = metrics(t, 7.0, 60.0, exits={0: 9.0} if t % 2 else None)
    [(t, _)] = anomalies(steps)
    assert t == 304  # the third step that has it


def test_steps_that_are_not_finite_in_a_row_roll_back_whatever_on_spike_is():
    config = RecoveryConfig(on_spike="ignore", max_skipped_updates=3)
    steps = healthy(20)
    for t in (5, 6, 10, 11, 12):
        steps[t] = metrics(t, math.nan)
    [(t, anomaly)] = anomalies(steps, config)
    assert (t, anomaly.steps, anomaly.rollback) == (12, 3, True)
    assert "3 steps in a row were not finite" in anomaly.reason


def test_a_gradient_or_any_exit_that_is_not_finite_makes_a_step_not_finite():
    assert metrics(0).finite
    assert not metrics(0, grad_norm=math.inf).finite
    assert not metrics(0, exits={1: math.nan, 3: 2.0}).finite


READING = Reading(
    40, (4000, 96), tuple(SourceRead(n, k, (Stretch("stream", 8, 9),)) for k, n in enumerate("ab"))
)


def test_the_state_survives_json():
    history = LossHistory((3.0, 2.5), (1.0, 2.0), 1, 2)
    state = RunState(9, 72, ((3, 9), (20, 30)), READING, ("outputs/x", 7), history, 12.5)
    assert run_state_from_dict(json.loads(json.dumps(state.as_dict()))) == state
    assert run_state_from_dict({}) == RunState()


def test_a_state_of_version_0_1_counts_batches():
    fields = RunState(loss_history=LossHistory((3.0,), (1.0,), 0, 0)).as_dict()
    fields = {"health": fields["loss_history"], "productive_seconds": 2.0}
    fields["skipped_batches"] = [[3, 5]]
    data = {"global_batch_size": 8, "seq_len": 16}
    state = run_state_from_dict(fields, step=4, data=data)
    assert (state.rows, state.tokens, state.skipped_rows) == (32, 512, ((24, 40),))
    assert (state.loss_history.losses, state.next_row) == ((3.0,), 48)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", None),
        ("rows", 1e400),
        ("rows", "x"),
        ("rows", -1),
        ("rows", 10**30),
        ("skipped_rows", 3),
        ("skipped_rows", [[1]]),
    ]
    + [("reading", []), ("reading", {"start": 0}), ("origin", [1]), ("loss_history", {})]
    + [("reading", {**asdict(READING), "rows_per_period": [4096]})]
    + [("reading", {**asdict(READING), "rows_per_period": [0, 4096]})]
    + [("reading", {**asdict(READING), "sources": [{"fingerprint": 1}]})],
)
def test_a_state_that_is_none_is_one_line(name, value):
    with pytest.raises(ValueError, match="checkpoint: the state of step 4 cannot be") as found:
        run_state_from_dict(RunState().as_dict() | {name: value}, step=4)
    assert "\n" not in str(found.value)


def test_detection_continues_from_a_saved_state():
    steps = [*healthy(300), *(metrics(t, 7.0, 60.0) for t in range(300, 304))]
    history = LossHistory()
    for step in steps:
        saved = json.loads(json.dumps(RunState(loss_history=history).as_dict()))
        resumed = run_state_from_dict(saved).loss_history
        history = history.after(step, L - 1, CONFIG)
        assert resumed.after(step, L - 1, CONFIG) == history


def test_a_rollback_is_as_far_as_set_or_as_checkpoints_go():
    assert rollback_step([100, 200, 300, 400], 401, CONFIG) == 300
    assert rollback_step([100, 200, 300, 400], 400, CONFIG) == 300
    assert rollback_step([100, 200, 300, 400], 399, CONFIG) == 200
    assert rollback_step([350, 400, 500], 401, CONFIG) == 350
    assert rollback_step([500], 401, CONFIG) is None


def test_every_row_from_the_checkpoint_to_the_anomaly_is_skipped():
    config = RecoveryConfig(skip_batches=300)
    assert skip_after_rollback(800, 1687, 8, config) == (800, 3200)
    assert skip_after_rollback(800, 5607, 8, config) == (800, 5608)
    # Once more, from rows that begin after a range already skipped.
    state = RunState(rows=1200, skipped_rows=((800, 3200),))
    first, last = state.next_row, int(state.step_rows(150, BatchRamp(8)).at(210)[-1])
    again = skip_after_rollback(first, last, 8, config)
    assert again == (3600, 6000)
    for t in range(150, 211):
        rows = state.skipping([again]).step_rows(150, BatchRamp(8)).at(t)
        assert (rows >= 6000).all()


def test_what_is_wrong_with_the_fields_is_named():
    assert RecoveryConfig().problems() == []
    [problem] = RecoveryConfig(spike_steps=0).problems()
    assert problem == "recovery.spike_steps: 0, must be at least 1"
