"""The metrics file survives kills, and the console line holds the same numbers."""

import json

from train.config.demos import demo
from train.loop.report import exit_metrics, step_line, validation_line
from train.run_folder.metrics import JsonLines


def test_steps_done_again_are_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in (10, 20, 30):
        first.log({"x": step}, step)
    with path.open("a") as torn:
        torn.write('{"step": 40, "x')
    again = JsonLines(path, 20)
    again.log({"x": -1.0}, 30)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10, "x": 10}, {"step": 20, "x": 20}, {"step": 30, "x": -1.0}]


def test_exits_are_named_by_the_layers_they_run_so_that_they_sort():
    metrics = exit_metrics("train", {2: 3.0, 11: 2.0}, L=12)
    assert metrics == {"train/loss": 2.0, "train/loss_exit_03": 3.0, "train/loss_exit_12": 2.0}
    assert "train/loss" not in exit_metrics("train", {2: 3.0}, L=12)


def test_console_line_shows_first_middle_and_last_exit():
    config = demo()
    metrics = {
        "train/J": 1.5,
        **exit_metrics("train", {0: 5.0, 2: 4.0, 3: 3.5, 6: 3.0, 7: 2.0}, L=8),
        "optim/grad_norm": 0.7,
        "progress/skipped_updates": 0.0,
        "optim/lr": 1e-3,
        "perf/tokens_per_second": config.data.tokens_per_step * 2.0,
        "perf/gflops_per_second": 12.3,
        "perf/data_wait": 0.0125,
        "perf/peak_memory_gib": 0.5,
    }
    line = step_line(metrics, 240, T=500, tokens_left=260 * config.data.tokens_per_step)
    assert "exit loss E=1 5.000, E=4 3.500, E=8 2.000" in line
    assert "12.3 GFLOP/s | data wait 1.2% | 0.50 GiB" in line
    assert "ETA 2:10" in line


def test_validation_line_counts_the_layers_run():
    line = validation_line([5.25, 4.5], 250, "held-out loss")
    assert line == "held-out loss at step 250, by exit: E=1 5.250 E=2 4.500 | perplexity 90.0"
