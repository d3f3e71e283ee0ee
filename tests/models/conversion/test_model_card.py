"""The card's table counts the layers run, E, whichever version wrote the metrics."""

import json

import pytest

from models.conversion.model_card import exit_losses


@pytest.mark.parametrize("first", [0, 1], ids=["version 0.1", "now"])
def test_exits_count_from_one(tmp_path, first):
    losses = {f"validation/loss_exit_{first + i:02d}": 5.0 - i for i in range(3)}
    rows = [{"step": 7, "train/loss_exit_02": 9.0}, {"step": 7, "validation/loss": 3.0, **losses}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    checkpoint = tmp_path / "checkpoints" / "step-00000007"
    assert exit_losses(checkpoint, 7) == {1: 5.0, 2: 4.0, 3: 3.0}
    assert exit_losses(checkpoint, 8) == {}
