"""Trackio: one run per run folder, all it takes, and a remedy where it is missing."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from tests.training import ROOT
from train.run_folder.trackio_run import open_trackio

# Its folder is read from the environment when it is imported, so each start is a process.
LOG = """
import sys
from pathlib import Path
from train.run_folder.heat_map import HeatMap
from train.run_folder.histogram import Histogram
from train.run_folder.trackio_run import open_trackio
folder, step = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
run = open_trackio(folder, "skipstone", "rates", {"optim": {"lr": 1e-3}})
labels = {"rows": ["2", "1"], "columns": ["10", "20"], "row_axis": "E", "column_axis": "step"}
run.log({"loss/train": 3.0}, step)
run.log_texts({"settings": "| a |"}, step)
run.log_histograms({"updates/update_ratio/norm": Histogram([1, 2], -2.0, 2.0)}, step)
picture = HeatMap(title="t", values=[[1, 2], [3, 4]], **labels)
run.log_heat_maps({"losses_train/all_exits": picture}, step)
run.log_summary({}, "finished")
run.close()
"""


def rows(database):
    """Return (id of the run, step, what was logged) of every record, oldest first."""
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id")
        return [(run, step, json.loads(metrics)) for run, step, metrics in found]


def test_a_resumed_run_goes_on_and_one_of_the_same_name_elsewhere_is_another(tmp_path):
    pytest.importorskip("trackio")
    for folder, step in (("a", 10), ("a", 20), ("b", 10)):
        done = subprocess.run(
            [sys.executable, "-c", LOG, tmp_path / folder / "demo", str(step)],
            cwd=ROOT, env={"PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "all")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    logged = rows(tmp_path / "all" / "skipstone.db")
    losses = [(run, step) for run, step, metrics in logged if metrics.get("loss/train") == 3.0]
    (first, at), (second, then), (third, _) = losses
    assert first == second != third
    assert (at, then) == (10, 20)
    names = {name for _, _, metrics in logged for name in metrics}
    assert names >= {
        "settings", "updates/update_ratio/norm", "losses_train/all_exits", "state",
    }  # fmt: skip
    assert list((tmp_path / "all" / "media").rglob("*.png"))


def test_where_it_is_missing_the_remedy_is_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert open_trackio(tmp_path, "skipstone", "", {}) is None
    assert "pip install 'skipstone[trackio]'" in caplog.text
    assert not list(tmp_path.iterdir())
