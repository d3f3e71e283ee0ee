"""TensorBoard's pages in a browser, after runs of three exits of which one was resumed."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from tests.browser import opened
from tests.training import Training

pytestmark = pytest.mark.slow


@contextmanager
def served(folder, runs):
    """Yield the address of a TensorBoard that has read `runs` runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    board = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words, "--load_fast=false"],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/images/tags") as answer:
                    if len(json.load(answer)) == runs:
                        break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        board.terminate()
        board.wait()


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Return the folder of a run that was killed and resumed, and of one with another rate."""
    training = Training(corpus, tmp_path_factory.mktemp("pages") / "outputs")
    fields = {
        "model__n_layers": 3,
        "metrics__interval_steps": 1,
        "checkpoint__asynchronous": False,
        "validate__interval_steps": 2,
        "adam_monitor__interval_steps": 2,
    }
    training.run_killed_after("step 4/8", name="resumed", **fields)
    for name, lr in (("resumed", 3e-3), ("other", 1e-3)):
        status, output = training.run(name=name, optim__lr=lr, **fields)
        assert status == 0, output
    return training.output


@pytest.fixture(scope="module")
def address(trained):
    """Return the address of a TensorBoard of both."""
    with served(trained, runs=2) as address:
        yield address


def photographed(page, tmp_path, name):
    """Check that a page is more than an empty frame: its picture does not compress to nothing."""
    path = tmp_path / f"{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size > 20_000


def test_every_page_shows_what_a_run_of_three_exits_has(chromium, address, tmp_path):
    size = {"viewport": {"width": 1300, "height": 900}}
    with opened(chromium, f"{address}/#scalars", **size) as (page, errors):
        page.get_by_text("tag: loss/held_out").wait_for()
        titles = page.locator("tf-category-paginated-view .category-name, .category-name")
        first = [text.strip() for text in titles.all_inner_texts() if text.strip()]
        assert first[:3] == ["loss", "losses_held_out", "losses_train"]
        for tag in ("loss/held_out", "loss/train"):  # on the first screen, without scrolling
            box = page.get_by_text(f"tag: {tag}", exact=True).bounding_box()
            assert box["y"] + 250 < 900
        for run in ("resumed", "other"):  # named by their folders
            assert page.get_by_text(run, exact=True).first.is_visible()
        photographed(page, tmp_path, "scalars")
        assert errors == []
    with opened(chromium, f"{address}/#custom_scalars", **size) as (page, errors):
        page.get_by_text("Held out, by exit").wait_for()
        page.get_by_text("Matches (6)").first.wait_for()  # three exits of two runs
        assert page.get_by_text("Matches (0)").count() == 0
        assert page.get_by_text("Restarts and rollbacks").count() == 1
        photographed(page, tmp_path, "custom_scalars")
        assert errors == []
    with opened(chromium, f"{address}/#images", **size) as (page, errors):
        for name in ("losses_held_out", "losses_train", "schedule"):
            page.get_by_text(name, exact=True).first.wait_for()
        pictures = page.locator("img")
        pictures.nth(3).wait_for()  # of losses, held out and training, of two runs
        loaded = "image => image.decode().then(() => image.naturalWidth)"
        assert min(picture.evaluate(loaded) for picture in pictures.all()[:4]) > 300
        photographed(page, tmp_path, "images")
        assert errors == []
    with opened(chromium, f"{address}/#text", **size) as (page, errors):
        page.get_by_text("resumed on 1 rank").wait_for()
        assert page.get_by_text("All settings:").count() >= 1
        photographed(page, tmp_path, "text")
        assert errors == []
    with opened(chromium, f"{address}/#hparams", **size) as (page, errors):
        page.get_by_text("Trial ID").wait_for()
        for cell in ("resumed", "other", "0.0030000", "0.0010000"):
            page.get_by_text(cell, exact=True).first.wait_for()
        photographed(page, tmp_path, "hparams")
        assert errors == []
