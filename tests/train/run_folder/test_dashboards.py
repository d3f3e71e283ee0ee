"""What people watch: names that begin with the losses, pictures, marks, and a table of runs."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams

from train.config.demos import demo
from train.monitoring.adam_statistics import AdamStatistics, GroupStatistics
from train.run_folder import dashboards as module
from train.run_folder.dashboards import Dashboards
from train.run_folder.heat_map import HeatMap, png_of
from train.run_folder.metrics import MetricsConfig, open_metrics
from train.run_folder.pictures import MAX_COLUMNS, Pictures
from train.run_folder.settings_text import settings_text
from train.run_folder.shown_names import shown

L = 8
BY_EXIT = ("Held out, by exit", "Training, by exit")
RANK = SimpleNamespace(is_main=True)


def row(step, restarts=0.0):
    """Return what a run logs at a step, with numbers that tell what they are of."""
    exits = {f"train/loss_exit_{E:02d}": 10.0 - E + 1 / step for E in range(1, L + 1)}
    return {
        "train/J": 5.0,
        "train/loss": exits["train/loss_exit_08"],
        **exits,
        "optim/lr": 1e-3,
        "layerskip/p_max_t": 0.1,
        **{f"layerskip/drop_prob_{layer:02d}": layer / 80 for layer in range(1, L + 1)},
        "perf/mfu": 0.4,
        "progress/restarts": restarts,
        "progress/rollbacks": 0.0,
        "progress/batch_size": 8.0 if step < 30 else 16.0,
    }


def held_out(step):
    exits = {f"validation/loss_exit_{E:02d}": 11.0 - E + 1 / step for E in range(1, L + 1)}
    return {"validation/loss": exits["validation/loss_exit_08"], **exits}


def adam():
    """Return what the monitor of Adam's updates logs for a model of 8 layers."""
    names = [f"layers_{l:02d}" for l in range(L)] + ["lm_head", "norm", "tok_embeddings"]
    return AdamStatistics(
        groups={
            name: GroupStatistics(
                adam_steps=50.0,
                update_rms=0.1 * i,
                update_rms_before=None,
                share_large=0.01 * i,
                share_starved=0.0,
                bimodality=0.3,
                grad_rms_over_eps=100.0 + i,
                lags={lag: 0.1 for lag in range(1, 9)},
                histogram=(0,) * 64,
            )
            for i, name in enumerate(names)
        }
    ).metrics()


def boards(run, done_steps=0, **settings):
    """Open what a demo run in this folder logs to."""
    return open_metrics(
        MetricsConfig(**settings),
        run,
        demo().as_dict() | {"name": run.name},
        done_steps=done_steps,
        runtime=RANK,
    )


def read(run):
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def sort_key(tag):
    """Return what TensorBoard's page sorts by: a separator comes before any other character."""
    return [(c not in "/_", c) for c in tag.replace("_", "/")]


def test_the_first_charts_are_the_losses_and_the_143_of_adam_are_five():
    statistics = adam()
    assert len(statistics) == 143
    charts = shown(row(10) | held_out(10) | statistics | {"early_exit/agreement_exit_02": 0.5})
    assert len([name for name in charts if name.startswith("updates/")]) == 5
    assert charts["updates/update_rms_max"] == 1.0
    assert charts["updates/update_rms_median"] == 0.5
    assert charts["updates/grad_rms_over_eps_min"] == 100.0
    ordered = sorted(charts, key=sort_key)
    assert ordered[:3] == ["loss/held_out", "loss/train", "loss/train_J"]
    groups = list(dict.fromkeys(name.split("/")[0] for name in ordered))
    assert groups == [
        *("loss", "losses_held_out", "losses_train", "marks", "optim", "perf", "schedule"),
        *("speculation", "updates"),
    ]
    assert charts["losses_train/exit_03"] == pytest.approx(7.1)
    assert shown({"mine/own": 1.0}) == {"mine/own": 1.0}  # what nobody has named stays


def test_a_run_of_an_older_version_goes_on_with_all_its_curves(tmp_path):
    run = tmp_path / "old"
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "events.out.tfevents.1.host.1.0").write_bytes(b"")
    records = [{"step": step, **row(step)} for step in (10, 20, 30, 40)]
    records.insert(2, {"step": 20, **held_out(20), "adam/update_ratio/norm": {"counts": [1]}})
    lines = [json.dumps(record) for record in records]
    lines.insert(1, '{"step": 15, "train/lo')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events = [
        {"time": 1.0, "kind": "start", "step": 0, "world_size": 1},
        {"time": 2.0, "kind": "rollback", "step": 12, "to": 10, "reason": "a spike"},
        {"time": 3.0, "kind": "start", "step": 30, "world_size": 2},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    metrics = boards(run, done_steps=30)
    metrics.log(row(40, restarts=1.0), 40)
    metrics.log(held_out(40), 40)
    metrics.log_summary({"final/best_exit": 8.0}, "finished")
    board = read(run)
    assert [e.step for e in board.Scalars("loss/train")] == [10, 20, 30, 40]
    assert [e.step for e in board.Scalars("losses_held_out/exit_08")] == [20, 40]
    low, high = (board.Scalars(f"margin/{name}")[-1].value for name in ("low", "high"))
    assert (low, high) == pytest.approx((row(40)["train/loss"], held_out(40)["validation/loss"]))
    assert [(e.step, e.value) for e in board.Scalars("final/best_exit")] == [(40, 8.0)]
    [*_, marks] = board.Tensors("marks")
    assert marks.tensor_proto.string_val[0].decode().splitlines()[2:] == [
        "| 12 | rolled back to step 10: a spike |",
        "| 30 | batch of 8 becomes 16 |",
        "| 30 | resumed on 2 ranks |",
    ]
    # Once more: nothing is given twice.
    boards(run, done_steps=40).log(row(50, restarts=2.0), 50)
    assert [e.step for e in read(run).Scalars("loss/train")] == [10, 20, 30, 40, 50]


def test_every_chart_of_the_layout_finds_its_curves(tmp_path):
    metrics = boards(tmp_path)
    metrics.log(row(10) | {"early_exit/agreement_exit_02": 0.5}, 10)
    metrics.log(held_out(10) | {"speculation/acceptance_E2_d4": 0.7}, 10)
    board = read(tmp_path)
    [event] = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    for chart in charts:
        series = [
            tag for each in chart.margin.series for tag in (each.value, each.lower, each.upper)
        ]
        assert set(series) <= set(board.Tags()["scalars"])
        for pattern in chart.multiline.tag:
            assert any(re.match(pattern, tag) for tag in board.Tags()["scalars"]), pattern
    [held, trained] = [c.multiline.tag for c in charts if c.title in BY_EXIT]
    assert len(held) == len(trained) == 4
    assert held[0] == "losses_held_out/exit_08$"


def test_runs_of_a_sweep_are_a_table_by_what_differs(tmp_path):
    """Read by TensorBoard's own code for the table of HParams."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    for name, lr in (("slow", 1e-3), ("fast", 4e-3)):
        (tmp_path / name).mkdir()
        config = demo().as_dict()
        config |= {"name": name, "optim": config["optim"] | {"lr": lr}}
        metrics = open_metrics(MetricsConfig(), tmp_path / name, config, done_steps=0, runtime=RANK)
        metrics.log(row(10) | held_out(10), 10)
        metrics.log_summary({}, "finished")
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    assert {*multiplexer.Runs()} == {"slow", "fast"}
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = Context(TBContext(data_provider=provider))
    tags = context.hparams_metadata(RequestContext(), "")
    table = context.experiment_from_metadata(RequestContext(), "", True, tags, [])
    assert [info.name for info in table.hparam_infos if info.differs] == ["optim.lr"]
    assert "early_exit.e_scale" in {info.name for info in table.hparam_infos}
    assert [info.name.tag for info in table.metric_infos][:2] == ["loss/held_out", "loss/train"]
    for run in ("slow", "fast"):
        end = hparams.parse_session_end_info_plugin_data(tags[run][hparams.SESSION_END_INFO_TAG])
        assert end.status == 1  # success


def test_pictures_have_every_layer_and_a_bounded_number_of_steps():
    pictures = Pictures()
    for step in range(10, 10 * 3 * MAX_COLUMNS, 10):
        pictures.add(row(step, restarts=float(step >= 1000)) | adam(), step)
    drawn = pictures.draw()
    assert set(drawn) == {
        "losses_train/all_exits", "schedule/dropped_layers", "updates/rms_by_layer",
        "updates/starved_by_layer", "updates/correlation_by_layer",
    }  # fmt: skip
    exits = drawn["losses_train/all_exits"]
    assert exits.rows == ["8", "7", "6", "5", "4", "3", "2", "1"]
    steps = [int(label.replace(",", "")) for label in exits.columns]
    assert MAX_COLUMNS / 2 <= len(steps) <= MAX_COLUMNS
    assert len(set(np.diff(steps))) == 1  # evenly apart, the first step among them
    assert steps[0] == 10
    expected = [[10.0 - E + 1 / step for step in steps] for E in range(L, 0, -1)]
    assert np.allclose(exits.values, expected)
    [mark] = exits.marks
    assert steps[mark - 1] < 1000 <= steps[mark]
    assert drawn["updates/rms_by_layer"].rows[-3:] == ["lm_head", "norm", "tok_embeddings"]
    assert drawn["schedule/dropped_layers"].values[0][0] == 0.1  # the last layer at the top


def test_a_picture_is_small_and_has_a_hole_where_there_is_no_number():
    values = np.random.default_rng(0).random((80, MAX_COLUMNS))
    labels = {"rows": [str(i) for i in range(80)], "columns": [str(i) for i in range(MAX_COLUMNS)]}
    axes = {"title": "t", "row_axis": "r", "column_axis": "c", "low": 0.0, "high": 1.0}
    whole = png_of(HeatMap(values=values, marks=(7,), **labels, **axes))
    assert whole.startswith(b"\x89PNG")
    assert len(whole) < 150_000

    def white(png):
        return (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) == 255).all(-1).sum()

    values[:, 100:] = np.nan
    holed = png_of(HeatMap(values=values, marks=(7,), **labels, **axes))
    assert white(holed) > 1.5 * white(whole)


def test_drawing_takes_a_hundredth_of_the_time_and_ever_longer_turns(monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Board:
        target = "board"
        log = log_texts = lambda self, values, step: None

        def log_heat_maps(self, maps, step):
            drawn.append(now[0])
            now[0] += 3.0

        def log_summary(self, values, state):
            pass

    boards = Dashboards([Board()])
    for step in range(1, 2000):
        now[0] += 100.0
        boards.log(row(step), step)
    apart = np.diff([0.0, *drawn])
    assert (apart[1:] >= 300).all()
    assert len(drawn) * 3.0 < 0.01 * now[0]
    assert len(drawn) < 40
    before = len(drawn)
    boards.log_summary({}, "preempted")  # is to end at once
    assert len(drawn) == before
    boards.log_summary({}, "finished")
    assert len(drawn) == before + 1


def test_settings_that_differ_from_the_preset_come_first():
    preset = demo().as_dict()
    config = preset | {"optim": preset["optim"] | {"lr": 5e-4, "betas": [0.9, 0.99]}}
    text = settings_text(config, preset)
    assert text.splitlines()[:4] == [
        "| setting | preset | this run |",
        "|---|---|---|",
        f"| optim.lr | {preset['optim']['lr']} | 0.0005 |",
        "| optim.betas | 0.9 0.95 | 0.9 0.99 |",
    ]
    assert json.loads(text.split("```json\n")[1].removesuffix("\n```")) == config
    assert settings_text(preset, preset).startswith("All settings are the preset's.")
    assert settings_text(preset, None).startswith("All settings:")
