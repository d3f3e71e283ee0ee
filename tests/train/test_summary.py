"""What a run came to, read from its metrics."""

import json

from train.summary import best_exit_line, read_last


def test_the_best_exit_is_the_first_that_does_about_as_well_as_all_layers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = {1: 4.0, 2: 3.05, 3: 2.9, 4: 3.0}
    lines = [{"step": 1, "validation/loss_exit_04": 9.0}, {"step": 2, "text": {"text": "x"}}]
    lines += [{"step": 3, **{f"validation/loss_exit_0{E}": loss for E, loss in losses.items()}}]
    torn = '{"step": 4, "validation/loss_exit_04": '
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    line = best_exit_line(read_last(path), 4)
    assert line == (
        "best exit: E=2 of 4, held-out loss 3.050, the first within 2% of all layers' 3.000; "
        "lowest 2.900 at E=3"
    )
    assert best_exit_line({"validation/loss_exit_01": 1.0}, 4) == "", "not all layers' loss"
    assert best_exit_line({"validation/loss_exit_02": float("nan")}, 2) == ""
    assert best_exit_line({"validation/loss_exit_01": 1.0}, 1) == "", "no other exit"
