import os
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from train.parallel.runtime import Runtime
from train.run_folder import preflight
from train.run_folder.preflight import check_run_folder, name_problems


class Alone(Runtime):
    def gather(self, value):
        return [value]


ALONE = Alone(0, 1, torch.device("cpu"), "")


def check(run_dir, output_dir, needed_bytes=0):
    check_run_folder(run_dir, output_dir, needed_bytes=needed_bytes, runtime=ALONE)


@pytest.mark.parametrize("name", ["demo", "7b-lr3e-4", "a.b_c", "_", "x" * 200])
def test_plain_names_pass(name):
    assert name_problems(name) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "-x", "a/b", "../a", "a b", "a\n", "\u00e9", "a:b", "x" * 201]
)
def test_names_that_are_no_plain_folder_are_refused(name):
    assert len(name_problems(name)) == 1


def test_a_good_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        check(tmp_path / "outputs" / "run", tmp_path / "outputs", 2**20)
        assert list((tmp_path / "outputs" / "run").iterdir()) == []


@pytest.mark.parametrize("target", ["elsewhere", "outputs"])
def test_a_run_folder_that_leads_out_of_the_outputs_is_refused(tmp_path, target):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "outputs" / "run").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="name: .* leads to .*, outside of .*, remove the link"):
        check(tmp_path / "outputs" / "run", tmp_path / "outputs")
    with pytest.raises(ValueError, match="outside of"):
        check(tmp_path / "outputs" / ".." / "elsewhere", tmp_path / "outputs")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_outputs_themselves_may_be_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "scratch")
    check(tmp_path / "outputs" / "run", tmp_path / "outputs")
    assert (tmp_path / "scratch" / "run").is_dir()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(ValueError, match="output_dir: .* cannot be made"):
        check(tmp_path / "outputs" / "run", tmp_path / "outputs")


def test_a_folder_that_cannot_be_written_is_refused():
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc, whose folders not even root can write")
    with pytest.raises(ValueError, match="output_dir: .* cannot be written"):
        check(Path("/proc/sys/kernel"), Path("/proc"))


def test_too_little_space_is_reported_in_numbers(tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": int(3.4 * 2**30)})
    )
    check(tmp_path / "run", tmp_path, int(2.8 * 2**30))
    with pytest.raises(ValueError, match=r"needs 12\.3 GiB, 3\.4 GiB free, delete old"):
        check(tmp_path / "run", tmp_path, int(10.25 * 2**30))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="GiB free"):
        check(tmp_path / "run", tmp_path, usage.f_frsize * usage.f_bavail)
    assert list((tmp_path / "run").iterdir()) == []


def two_ranks(runtime, folder):
    here = folder / f"host-{runtime.rank}"  # as disks of two hosts that share nothing
    (here / "run").mkdir(parents=True)
    preflight.SHARED_WITHIN_SECONDS = 0.5
    stop = ValueError if runtime.is_main else SystemExit
    message = "the file of rank 1 is missing" if runtime.is_main else "2"
    with pytest.raises(stop, match=message):
        check_run_folder(here / "run", here, needed_bytes=0, runtime=runtime)
    assert list((here / "run").iterdir()) == []
    missing = folder / "only-on-0" if runtime.is_main else here
    message = r"rank 0 but is not there, .* \(on rank 1\)" if runtime.is_main else "2"
    with pytest.raises(stop, match=message):
        check_run_folder(missing / "new", missing, needed_bytes=0, runtime=runtime)
    check_run_folder(folder / "run", folder, needed_bytes=0, runtime=runtime)
    runtime.gather(None)
    assert list((folder / "run").iterdir()) == []


def test_every_rank_must_see_what_the_others_write(tmp_path):
    run_distributed(two_ranks, 2, tmp_path)
