"""The user's path is the user's, and the dataset decides the vocabulary."""

import json
import shutil
from pathlib import Path

import pytest

from train.config.command_line import parse
from train.config.settled import settle
from train.loop.corpus import open_corpus, prepared_path


@pytest.fixture
def here(corpus, tmp_path, monkeypatch):
    """Return the working directory: outputs/data holds the tiny corpus, of 400 ids, as `mine`."""
    (tmp_path / "outputs" / "data").mkdir(parents=True)
    (tmp_path / "outputs" / "data" / "mine").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settled(*words):
    return settle(parse(words, show=False))


@pytest.mark.parametrize("preset", ["demo", "layerskip_110m", "continual_demo"])
@pytest.mark.parametrize("field", ["path", "also"])
def test_a_missing_dataset_is_refused_with_the_nearest_and_never_made(here, preset, field):
    mine = [] if field == "path" else ["--data.path", "outputs/data/mine"]
    with pytest.raises(
        ValueError, match=rf"^data.{field}: .*/mien does not exist, did you"
    ) as info:
        settled(preset, *mine, f"--data.{field}", "outputs/data/mien")
    assert "did you mean outputs/data/mine? Else make one" in str(info.value)
    with pytest.raises(ValueError, match=r" a/b does not exist, there are outputs/data/mine, or"):
        settled(preset, *mine, f"--data.{field}", "a/b")
    assert "\n" not in str(info.value)
    assert [path.name for path in here.rglob("*")] == ["outputs", "data", "mine"]


def test_text_is_prepared_at_a_path_of_its_own(here):
    assert settled("demo").data.path == "outputs/data/embedded-2048"
    assert settled("demo", "--model.vocab_size", "512").data.path == "outputs/data/embedded-512"
    own = settled("layerskip_110m", "--data.input", "b.txt", "c", "--model.vocab_size", "300").data
    assert own.path.startswith("outputs/data/b-")
    assert own.path.endswith("-300")
    assert own.path != str(prepared_path(("b.txt",), 300))
    named = settled("demo", "--data.path", "outputs/data/mine").data
    assert (named.path, named.input) == ("outputs/data/mine", ())
    with pytest.raises(ValueError, match="data.path: x does not exist, and nothing is prepared"):
        settled("demo", "--data.path", "x", "--data.input", "b.txt")
    with pytest.raises(ValueError, match="data.path: empty, "):  # of a variable that is not set
        settled("demo", "--data.path", "")
    with pytest.raises(ValueError, match="data.path: none, give --data.path"):
        settled("demo", "--data.input")
    # Nor by whoever opens the dataset of a configuration that was not settled.
    with pytest.raises(ValueError, match="dataset x does not exist"):
        open_corpus(parse(["demo", "--data.path", "x"], show=False).config.data, 2048)
    assert not Path("x").exists()


def test_the_configuration_of_a_run_settles_as_it_was(here):
    for words in (["demo"], ["demo", "--data.path", "outputs/data/mine"]):
        config = settled(*words)
        Path("config.json").write_text(json.dumps(config.as_dict()))
        assert settled("--config", "config.json") == config


def test_the_vocabulary_is_the_datasets_unless_given(here):
    mine = ["--data.path", "outputs/data/mine"]
    for preset in ("demo", "layerskip_110m"):
        assert settled(preset, *mine).model.vocab_size == 400
        assert settled(preset, *mine, "--data.vocab_multiple", "64").model.vocab_size == 448
        assert settled(preset, *mine, "--model.vocab_size", "512").model.vocab_size == 512
    assert settled("demo", "--data.vocab_multiple", "1000").model.vocab_size == 3000
    Path("fields.yaml").write_text("model: {vocab_size: 500}")
    assert settled("demo", "--config", "fields.yaml", *mine).model.vocab_size == 500


def test_a_plan_takes_the_vocabulary_of_a_dataset_that_is_there(here):
    plan = ["layerskip_110m", "--dry_run", "--data.path"]
    assert settled(*plan, "outputs/data/mine").model.vocab_size == 400
    assert settled(*plan, "outputs/data/mien").model.vocab_size == 32000
    start = ["--checkpoint.init_from", "gone"]
    assert settled(*plan, "outputs/data/mine", *start).model.vocab_size == 32000


def test_a_folder_that_is_no_dataset_is_named(here):
    shutil.copytree(here / "outputs/data/mine", here / "copy")
    (here / "copy" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"data.path: dataset copy has no dataset.json, there are"):
        settled("demo", "--data.path", "copy")
