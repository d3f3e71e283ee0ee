"""Sections of runs unlike the demo: deep, of one layer, with numbers that are none."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from inference.evaluation.exit_quality import ExitQuality
from inference.report_page.exits import RunExits, exits_section
from inference.report_page.measurements import Arms, arms_from, read_benchmark
from inference.report_page.metrics_log import LossLog, Series
from inference.report_page.overview import facts
from inference.report_page.source import Source
from inference.report_page.speed import speed_section
from inference.report_page.strategies import drafts_section, strategies_section, wilson
from inference.report_page.training import Logged, stretches, training_section

SOURCE = Source("train", "read")


def series(loss):
    return Series(np.array([1.0, 2.0, 3.0]), np.array([loss, math.nan, loss - 1]))


def test_32_exits_are_32_rows_of_a_heat_map_and_8_curves():
    log = LossLog(train={E: series(40.0 - E) for E in range(1, 33)}, not_finite=32)
    section = training_section([Logged("deep", log)], [SOURCE])
    labels = [f"E={E}<" in section.body for E in range(1, 33)]
    assert sum(labels) == 8
    assert labels[0]
    assert labels[-1]
    assert "32 logged losses are no finite number" in section.body


def test_losses_of_one_step_that_are_huge_or_no_number_are_drawn():
    train = {
        E: Series(np.array([5.0]), np.array([loss])) for E, loss in ((1, math.nan), (2, 1e299))
    }
    assert "<svg" in training_section([Logged("short", LossLog(train=train))], [SOURCE]).body


@pytest.mark.parametrize(
    "steps", [[5.0], [*range(10, 210, 10), 202], [*range(10, 990, 10), *range(1000, 9000, 500)]]
)
def test_no_stretch_of_steps_is_without_a_logged_one(steps):
    """Blank is for exits that were off, whatever the distance of the log lines."""
    edges = stretches(np.array(steps, float))
    counts, _ = np.histogram(steps, edges)
    assert counts.min() > 0
    assert counts.sum() == len(steps)


def test_a_log_of_which_nothing_can_be_read_says_so():
    section = training_section([Logged("damaged", LossLog(unread=7))], [SOURCE])
    assert "No training loss" in section.body
    assert "damaged: 7 lines of metrics.jsonl could not be read" in section.body


def test_exits_of_one_layer_have_one_tick():
    log = LossLog(train={1: series(4.0)})
    assert ">0.6<" not in training_section([Logged("flat", log)], [SOURCE]).body
    quality = dict.fromkeys((f for f in ExitQuality.__annotations__), 0.5)
    exits = [ExitQuality(**quality | {"E": 1})]
    assert ">0.96" not in exits_section([RunExits("flat", exits, 10, SOURCE)]).body


def test_what_is_missing_is_named_in_place_of_a_picture():
    bare = training_section([Logged("bare", None), Logged("<b>", None)], [SOURCE] * 2)
    assert "bare: no metrics.jsonl" in bare.body
    assert "&lt;b&gt;: no metrics.jsonl" in bare.body
    exits = exits_section([RunExits("bare", [], 0, None, "data: none, give --data")])
    assert "bare: data: none, give --data" in exits.body
    for section in (speed_section(None, None, "x"), drafts_section(None, "x")):
        assert "x</p>" in section.body


def test_names_of_others_are_text_in_pictures_and_captions():
    name = "</svg><script>alert('$x_$')</script>\x07"
    quality = dict.fromkeys((f for f in ExitQuality.__annotations__), 0.5)
    exits = [ExitQuality(**quality | {"E": E}) for E in (1, 2)]
    runs = [RunExits(n, exits, 10, SOURCE) for n in (name, name + "2")]
    section = exits_section(runs)
    starts = []
    HTML = type("R", (HTMLParser,), {"handle_starttag": lambda _, tag, __: starts.append(tag)})
    HTML().feed(section.body)
    assert "script" not in starts
    assert "alert('$x_$')" in section.pictures[0].svg.replace("&#x27;", "'")


def arm(**fields):
    content = {
        **{"strategy": "self_speculative", "settings": "self_speculative:E=2", "tokens": 9},
        **{"tokens_per_second": 5.0, "speedup": 1.5, "speeds": [5.0], "speedups": [1.5]},
        **{"layers_per_token": 3.0, "full_choice": 1.0, "log_likelihood": -1.0, "later": [1]},
        "drafts": {"drafted_at": [4, 4], "accepted_at": [4, 0], "stops": {"whole": 4}, "x": 1},
    }
    return content | fields


def test_files_with_senseless_numbers_are_drawn_or_noted():
    drafts = {"drafted_at": [0, -1], "accepted_at": [5, 5], "stops": {"whole": -3}}
    senseless = [
        {"settings": "</script>", "speedup": -1e30, "speedups": [1e30]},
        {"tokens_per_second": 1e300},
        {"drafts": drafts, "full_choice": 7.0, "bound": 1e9, "acceptance_rate": None},
    ]
    made = arms_from([arm(scores={"<b>rouge</b>": -4.0}), *(arm(**fields) for fields in senseless)])
    for section in (strategies_section, drafts_section):
        found = section(Arms(made, SOURCE), "")
        assert "<svg" in found.body
        assert "</script" not in found.body
        assert "<b>rouge" not in found.body
        assert "000000000000" not in found.body.partition("<table")[2]


def test_settings_that_a_name_leaves_out_are_shown_where_it_is_pointed_at():
    whole = "dynamic:exits=2+3:draft_costs=0.1+0.2:verify_costs=0.9+1.0"
    made = arms_from([arm(), arm(strategy="dynamic", settings=whole)])
    body = strategies_section(Arms(made, SOURCE), "").body
    assert f'title="{whole}">2 dynamic:exits=2+3:...<' in body
    assert body.count("title=") == 1


def test_the_number_at_the_top_says_where_the_machine_was_busy():
    quality = RunExits("run", [], 0, None)
    for slowest, words in ((8.0, []), (5.0, ["busy"])):
        speeds = {"speeds": [10.0, slowest], "speedups": [1.0, 1.0]}
        plain = arm(strategy="autoregressive", settings="autoregressive", **speeds)
        arms = Arms(arms_from([plain, arm(acceptance_rate=0.5, **speeds)]), SOURCE)
        [text] = [what for _, what in facts(quality, arms) if what.startswith("speed of")]
        assert [word for word in ("busy",) if word in text] == words


@pytest.mark.parametrize(
    "content",
    [
        *["", "[1]", "{}", "[" * 100_000, '{"arms": 3}', '{"arms": []}', '{"arms": [{}]}'],
        '{"arms": [{"strategy": 1}], "machine": {}, "step": 1, "checkpoint": "x"}',
    ],
)
def test_a_file_that_is_no_benchmark_is_one_line(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"^benchmark: .*x.json is not what") as error:
        read_benchmark(tmp_path / "x.json", "benchmark")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_benchmark(tmp_path, "benchmark")


def test_speeds_without_repeats_or_positions_that_do_not_match_are_refused():
    lists = {"drafted_at": [1], "accepted_at": [], "stops": {}}
    for fields in ({"speeds": []}, {"speedups": [1.0, 2.0]}, {"drafts": lists}):
        with pytest.raises(ValueError, match="give"):
            arms_from([arm(**fields)])
    with pytest.raises(ValueError, match="arms: 101"):
        arms_from([arm()] * 101)


def test_wilson_holds_the_share_and_equals_the_root_of_its_equation():
    z = 1.959964
    for hits, trials in ((0, 5), (5, 5), (3, 7), (50, 90)):
        share = hits / trials
        low, high = wilson(hits, trials)
        assert 0 <= low <= share <= high <= 1
        for edge in (low, high):
            if 0 < edge < 1:
                assert abs(share - edge) == pytest.approx(
                    z * math.sqrt(edge * (1 - edge) / trials), abs=1e-9
                )
