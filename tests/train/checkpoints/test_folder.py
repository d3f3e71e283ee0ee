"""Which checkpoints stay, what a kill leaves, and how a failure is described."""

import errno
import shutil

import pytest

from models.checkpoint_format import MANIFEST, checkpoint_steps
from train.checkpoints.folder import amount
from train.checkpoints.local_folder import LocalFolder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    for step in (100, 200, 250, 300, 400):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / MANIFEST).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("latest", "every", "kept"),
    [
        (2, 0, [300, 400]),
        (2, 100, [100, 200, 300, 400]),
        (1, 200, [200, 400]),
        (1, 1000, [400]),
        (9, 0, [100, 200, 250, 300, 400]),
        (0, 100, [100, 200, 250, 300, 400]),
    ],
)
def test_the_latest_and_every_nth_are_kept(folder, latest, every, kept):
    LocalFolder(folder).prune(latest, every)
    assert list(checkpoint_steps(folder)) == kept


def test_of_those_set_aside_the_newest_of_each_kind_stays(folder):
    aside = ["5.damaged", "6.abandoned", "7.damaged", "8.abandoned"]
    for name in aside:
        (folder / f"step-0000000{name}").mkdir()
    LocalFolder(folder).prune(1, 0)
    assert names(folder) == ["step-00000007.damaged", "step-00000008.abandoned", "step-00000400"]


def test_what_a_kill_left_is_put_right(folder):
    for name in ("500.tmp", "300.old", "600.old"):
        (folder / f"step-00000{name}").mkdir()
    (folder / "step-00000600.old" / MANIFEST).touch()
    LocalFolder(folder).clean_up()
    # 600 was killed between losing its name and its successor's getting it.
    assert list(checkpoint_steps(folder)) == [100, 200, 250, 300, 400, 600]
    assert len(names(folder)) == 6


def test_a_folder_that_may_not_be_changed_is_one_line(folder):
    (folder / "step-00000500.tmp").write_text("no folder")
    with pytest.raises(ValueError, match="Not a directory.*make it writable"):
        LocalFolder(folder).clean_up()


def test_a_failure_is_described_by_its_cause(tmp_path):
    gone = tmp_path / "not" / "there"
    free = shutil.disk_usage(tmp_path).free
    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert (
        LocalFolder(gone)
        .explain(OSError(errno.ENOSPC, "x"), 3 * 2**30)
        .startswith("disk full: needs 3.0 GiB, ")
    )
    assert LocalFolder(gone).explain(short, 2 * free).startswith("disk full: needs ")
    assert LocalFolder(gone).explain(short, 10).startswith("a write was cut short")
    assert "quota" in LocalFolder(gone).explain(OSError(errno.EDQUOT, "x"), 10)
    assert LocalFolder(gone).explain(OSError(errno.EACCES, "Permission denied", "/f"), 10) == (
        "[Errno 13] Permission denied: '/f'"
    )


def test_amounts():
    assert [amount(n) for n in (5, 2**10, 3 * 2**19, 2**31)] == [
        "5 B",
        "1.0 KiB",
        "1.5 MiB",
        "2.0 GiB",
    ]
