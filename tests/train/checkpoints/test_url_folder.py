"""Checkpoints in an object store: whole or none, verified, pruned, written through an outage."""

import logging

import pytest

from data.urls import UnreachableError, Url, UrlError
from models.checkpoint_format import MANIFEST, checkpoint_steps, find_checkpoint, verify
from tests.train import tiny
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.folder import ABANDONED
from train.checkpoints.resume import load_earlier
from train.checkpoints.start import check_start, load_initial_weights
from train.checkpoints.url_folder import HashedStreams, UrlFolder
from train.parallel.runtime import RuntimeConfig, start_runtime


@pytest.fixture(scope="module")
def runtime():
    with start_runtime(RuntimeConfig(), seed=0) as alone:
        yield alone


@pytest.fixture
def run(runtime, memory, tmp_path):
    """Return a folder with checkpoints at steps 3, 6 and 8 by URL, and their fingerprints."""
    model, optimizer = tiny.build(runtime)
    prints = {}
    with tiny.writer(tmp_path, model, optimizer, runtime, folder=memory) as writer:
        for before, step in ((0, 3), (3, 6), (6, 8)):
            tiny.train(model, optimizer, before, step)
            writer.save(step, {"at": step})
            prints[step] = tiny.fingerprint(model, optimizer)
    return memory, prints


def go_on(root, folder, runtime):
    """Return (t, state, fingerprint) of what a new process would go on with."""
    model, optimizer = tiny.build(runtime)
    found = tiny.load_newest(root, model, optimizer, runtime, folder=folder)
    return found.t, found.state, tiny.fingerprint(model, optimizer)


def warnings(caplog):
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING and "train" in r.name]


def test_what_is_written_by_url_is_what_a_path_would_hold(run, runtime, tmp_path):
    folder, prints = run
    assert list(checkpoint_steps(folder)) == [3, 6, 8]
    assert go_on(tmp_path, folder, runtime) == (8, {"at": 8}, prints[8])
    newest = find_checkpoint(folder)
    assert newest == folder / "step-00000008"
    # Digests noted while writing are those of the bytes in the store.
    copy = tmp_path / "copy" / newest.name
    copy.mkdir(parents=True)
    for name in newest.files():
        (newest / name).download(copy / name)
    assert verify(copy) == verify(newest)
    model, _ = tiny.build(runtime)
    check_start(folder / "none", CheckpointConfig(init_from=str(folder)))
    load_initial_weights(str(folder), model, runtime=runtime)


@pytest.mark.parametrize("damage", ["bytes", "missing", "cut"])
def test_a_damaged_one_is_set_aside_and_the_older_resumed(run, runtime, tmp_path, damage, caplog):
    folder, prints = run
    shard = folder / "step-00000008" / "__0_0.distcp"
    content = shard.read_bytes()
    if damage == "missing":
        shard.remove()
    else:
        shard.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "bytes" else b""))
    assert go_on(tmp_path, folder, runtime) == (6, {"at": 6}, prints[6])
    [line] = warnings(caplog)
    assert str(shard) in line
    assert list(checkpoint_steps(folder)) == [3, 6]
    assert f"{MANIFEST}.damaged" in (folder / "step-00000008").files()
    assert go_on(tmp_path, folder, runtime)[0] == 6
    UrlFolder(folder).clean_up()  # leaves it for its owner to look at
    assert f"{MANIFEST}.damaged" in (folder / "step-00000008").files()


def test_one_without_its_manifest_is_none_and_is_removed(run, runtime, tmp_path):
    folder, prints = run
    (folder / "step-00000008" / MANIFEST).remove()
    assert list(checkpoint_steps(folder)) == [3, 6]
    assert go_on(tmp_path, folder, runtime) == (6, {"at": 6}, prints[6])
    assert folder.folders() == ["step-00000003", "step-00000006"]


def test_the_latest_and_the_newest_set_aside_are_kept(run, runtime, tmp_path):
    folder, _ = run
    kept = UrlFolder(folder)
    model, optimizer = tiny.build(runtime)
    load_earlier(
        folder, model, optimizer, last_step=6, identity=tiny.identity(tmp_path), runtime=runtime
    )
    assert f"{MANIFEST}{ABANDONED}" in (folder / "step-00000008").files()
    kept.set_aside("step-00000003", ABANDONED)
    kept.prune(1, 0)
    assert folder.folders() == ["step-00000006", "step-00000008"]
    with tiny.writer(tmp_path, model, optimizer, runtime, folder=folder, keep_latest=1) as writer:
        writer.save(8, {}, required=True)  # in place of the one that was abandoned
    assert list(checkpoint_steps(folder)) == [8]
    assert folder.folders() == ["step-00000008"]
    verify(folder / "step-00000008")


def test_a_store_that_is_away_costs_checkpoints_and_then_the_run(
    runtime, memory, tmp_path, monkeypatch, caplog
):
    model, optimizer = tiny.build(runtime)
    tiny.train(model, optimizer, 0, 3)
    away = []
    open_url = Url.open

    def refuse(self, mode="rb"):
        if away:
            raise UnreachableError(f"{self}: cannot be reached")
        return open_url(self, mode)

    monkeypatch.setattr(Url, "open", refuse)
    with tiny.writer(tmp_path, model, optimizer, runtime, folder=memory, max_failures=2) as writer:
        writer.save(1, {}, required=True)
        away.append(True)
        writer.save(2, {})
        writer.wait()
        [line] = warnings(caplog)
        assert f"could not write step-00000002, {memory}/step-00000002/__0_0.distcp: cannot" in line
        assert "training continues (1 of at most 2 failures in a row)" in line
        away.clear()
        writer.save(3, {})
        writer.wait()
        away.append(True)
        writer.save(4, {})
        writer.wait()
        writer.save(5, {})
        with pytest.raises(OSError, match=r"2 in a row have failed\), then start the run again$"):
            writer.wait()
    assert list(checkpoint_steps(memory)) == [1, 3]
    assert memory.folders() == ["step-00000001", "step-00000003"]
    # Nor is it damage that a store cannot be read.
    with pytest.raises(ValueError, match="cannot be reached"):
        go_on(tmp_path, memory, runtime)
    away.clear()
    assert list(checkpoint_steps(memory)) == [1, 3]


def test_a_write_that_fails_leaves_no_file(memory):
    streams = HashedStreams()
    path = str(memory / "file")
    with pytest.raises(UrlError), streams.create_stream(path, "wb") as stream:  # noqa: PT012
        stream.write(b"half")
        raise RuntimeError("out of memory")
    assert not (memory / "file").is_file()
    assert not streams.entries
