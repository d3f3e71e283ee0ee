"""The report of a run: one page that opens from disk without a network, whatever the run holds."""

import json
import shutil
import sys
from contextlib import redirect_stderr

import pytest

from data.dataset import open_dataset
from inference import report
from models.checkpoint_format import MANIFEST
from tests.browser import opened
from tests.inference.conftest import make_run

NAME = "</title><script>alert(1)</script> \"quotes\" & 'more' \u202e $x$"
SECTIONS = ["training", "exits", "speed", "strategies", "rounds", "drafts", "tokens", "machine"]
QUICK = ["--prompts", "1", "--prompt_tokens", "12", "--max_new_tokens", "12", "--repeats", "2"]
QUICK += ["--max_tokens", "200", "--grid_tokens", "6"]


def copy_of(run_folder, target, *, config=None, log=()):
    """Copy a run, give its manifest another configuration, and write its log."""
    shutil.copytree(run_folder, target)
    for path in target.glob(f"checkpoints/*/{MANIFEST}"):
        content = json.loads(path.read_text())
        del content["sha256"]
        content["config"] = content["config"] | config if config else config or {}
        path.write_text(json.dumps(content))
    if log:
        (target / "metrics.jsonl").write_text("\n".join(log))
    return target


def lines(offset):
    names = [f"train/loss_exit_{E:02d}" for E in range(1, 5)]
    for step in range(10, 200, 10):
        losses = {name: 6.0 - step / 100 - E / 10 + offset for E, name in enumerate(names)}
        held_out = {"validation/loss_exit_04": 4.0} if step % 100 == 0 else {}
        yield json.dumps({"step": step, "progress/tokens": step * 8.0} | losses | held_out)
    yield '{"step": 200, "train/loss_ex'


def run_report(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", *map(str, arguments)])
        report.main()


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    """The report of a run with a hostile name and a baseline beside it."""
    root = tmp_path_factory.mktemp("report")
    first = copy_of(run_folder, root / "first", config={"name": NAME}, log=[*lines(0.0)])
    dense = copy_of(run_folder, root / "dense", config={"name": "dense"}, log=[*lines(0.5)])
    (first / "reports").mkdir()
    (first / "reports" / "exits.json").write_text('{"exits": [')
    (first / "reports" / "speed.json").write_text('{"arms": 7}')
    with (first / "reports" / "progress").open("w") as file, redirect_stderr(file):
        run_report("--run", first, dense, *QUICK)
    return first / "reports" / "report.html"


def test_the_page_and_its_pictures_are_written_and_small(page):
    assert page.stat().st_size < 5_000_000
    pictures = sorted(path.stem for path in (page.parent / "report-pictures").glob("*.png"))
    assert pictures == sorted(set(SECTIONS) - {"machine"})
    assert not [*page.parent.glob("*.tmp")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_without_a_network(scheme, page, chromium):
    url = page.as_uri()
    with opened(chromium, url, color_scheme=scheme, offline=True) as (tab, errors):
        assert tab.locator("section").evaluate_all("all => all.map(x => x.id)") == SECTIONS
        assert tab.locator("section figure svg").count() == len(SECTIONS) - 2
        assert "alert(1)" in tab.locator("h1").inner_text()
        assert tab.locator("script").count() == 1
        ink, paper = (
            tab.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/)[0]")
            for name in ("color", "backgroundColor")
        )
        assert (int(ink) < int(paper)) == (scheme == "light")
        for picture in tab.locator("figure svg").all():
            fills = picture.evaluate("x => getComputedStyle(x.querySelector('text')).fill")
            assert fills == tab.evaluate("getComputedStyle(document.body).color")
        tip = tab.locator("#tip")
        assert tip.is_hidden()
        tab.locator(".grid tbody td").first.hover()
        assert "entropy" in tip.inner_text()
        tab.locator("div.text .tok").first.hover()
        assert "under all layers" in tip.inner_text()
        tab.locator(".grid thead th[tabindex='0']").focus()
        assert tip.inner_text().count("E=") == 5
        before = tip.inner_text()
        tab.keyboard.press("ArrowRight")
        assert tip.inner_text() != before
        tab.keyboard.press("Escape")
        assert tip.is_hidden()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not errors


def test_every_figure_names_command_machine_and_date(page):
    text = page.read_text()
    for figure in text.split("<figure")[1:]:
        source = figure.partition('class="source">')[2].partition("</p>")[0]
        assert "<code>" in source
        assert "torch" in source
        assert "20" in source.rpartition("\u00b7")[2]


def test_a_page_without_scripts_shows_titles_and_loads_nothing(page):
    text = page.read_text()
    assert "http://www.w3.org" in text
    for word in ("<link", "src=", "@import", "url(http", "https://"):
        assert word not in text.replace("xmlns", "").replace("img-src", "")


def test_damaged_files_of_earlier_commands_are_left_out(page):
    progress = (page.parent / "progress").read_text()
    assert "exits.json: left out" in progress
    assert "speed.json is not what inference.benchmark --json writes" in progress


def test_a_converted_model_of_one_layer_has_a_report_too(run_folder, tmp_path, capsys):
    dataset = open_dataset(run_folder.parent / "data")
    bare = make_run(tmp_path / "one", dataset, dataset.vocab_size, n_layers=1)
    run = copy_of(bare, tmp_path / "bare")
    run_report("--run", run, *QUICK)
    text = (run / "reports" / "report.html").read_text()
    assert "names none, give --data" in text
    assert text.count("<figure") == 0
    (tmp_path / "prompts.txt").write_text("the cat\n")
    run_report("--run", run, *QUICK, "--prompt_file", tmp_path / "prompts.txt")
    text = (run / "reports" / "report.html").read_text()
    assert "A continuation by all layers" in text
    assert "A model of 1 layer has no exit" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nowhere"], "error: run: nowhere"),
        (["--run", "RUN", "--benchmark", "none.json"], "error: benchmark: none.json"),
        (["--run", "RUN", "--data", "nowhere"], "nowhere"),
        (["--run", "RUN", "--output", "/proc/x.html"], "error: "),
        ([], "error: run: none"),
    ],
)
def test_errors_are_one_line(words, message, run_folder, tmp_path, capsys):
    words = [str(run_folder) if word == "RUN" else word for word in words]
    output = [] if "--output" in words else ["--output", tmp_path / "x.html"]
    with pytest.raises(SystemExit) as stop:
        run_report(*words, *QUICK, *output)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
