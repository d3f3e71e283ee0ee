"""W&B is given one run per run folder, where the user wants it, and all that dashboards show."""

import sys
from types import SimpleNamespace

from train.run_folder.heat_map import HeatMap
from train.run_folder.weights_and_biases import WeightsAndBiases, Where


class Recorder:
    """Stands in for the package: what it was given."""

    def __init__(self):
        self.started, self.logged, self.summary = {}, [], {}

    def init(self, **settings):
        self.started = settings
        return SimpleNamespace(
            define_metric=lambda *names, **more: None,
            log=self.logged.append,
            summary=self.summary,
        )

    def __getattr__(self, name):  # Histogram, Image, Html
        return lambda *values, **named: (name, *values)


def test_entity_group_and_tags_are_passed_on_and_texts_are_not_taken_for_html(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", package := Recorder())
    where = Where(project="exits", entity="team", group="rates", tags=("a", "b"))
    run = WeightsAndBiases(tmp_path / "demo", where, {"steps": 3}, name="id-1", mode="offline")
    expected = {"project": "exits", "entity": "team", "group": "rates", "tags": ["a", "b"]}
    expected |= {"name": "demo", "id": "id-1", "resume": "allow"}
    assert package.started.items() >= expected.items()
    run.log_texts({"samples/prompt_1": "<script> | a"}, 10)
    assert package.logged[-1] == {
        "step": 10, "samples/prompt_1": ("Html", "<pre>&lt;script&gt; | a</pre>"),
    }  # fmt: skip
    labels = {"rows": ["1"], "columns": ["10", "20"], "row_axis": "E", "column_axis": "step"}
    run.log_heat_maps({"map": HeatMap(title="t", values=[[1.0, 2.0]], **labels)}, 20)
    kind, image = package.logged[-1]["map"]
    assert kind == "Image"
    assert image.size == (672, 360)
    run.log_summary({"loss/held_out": 3.5}, "finished")
    assert package.summary == {"loss/held_out": 3.5, "state": "finished"}
    plain = WeightsAndBiases(tmp_path, Where(project="p"), {}, name="id-2", mode="offline")
    assert plain.target == "wandb"
    assert package.started["entity"] is package.started["group"] is package.started["tags"] is None
